"""What merge rules share."""
