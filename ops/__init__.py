"""Operations: settings, ledger, artifacts, metrics and the command line. Knows nothing of models or streams."""
