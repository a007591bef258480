"""What ``ratchet init`` does: checks the model and the broker, makes suites of pictures, writes the settings file."""
