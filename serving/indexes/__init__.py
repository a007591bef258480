"""Indexes outside (pgvector, Qdrant): a worker keeps their vectors in the image spaces of the releases that matter."""
