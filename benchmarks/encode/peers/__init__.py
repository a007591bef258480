"""Other servers of the same model, each in a Python environment of its own."""
