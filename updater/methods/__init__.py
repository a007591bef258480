"""The methods that the shipped recipes name, and the protocols of those that other packages bring."""
