"""The base of all parts: settings, errors, ledger, artifacts, metrics, access, logs, processes and addresses."""
