"""What every part stands on: settings, errors, ledger, artifacts, metrics, access, logs, processes and addresses."""
