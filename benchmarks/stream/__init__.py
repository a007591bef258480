"""Benchmarks of the stream: what ingest does in a second, what it costs as the store grows, and what breaks it."""
