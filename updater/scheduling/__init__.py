"""When an update begins, on which data, and when a candidate is gated again."""
