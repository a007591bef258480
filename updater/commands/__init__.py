"""What the command line runs of the updater."""
