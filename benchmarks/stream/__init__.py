"""Benchmarks of the stream: the throughput of ingest, its cost as the store grows, and its failures."""
