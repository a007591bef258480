"""Other servers of the same model, each in its own Python environment."""
