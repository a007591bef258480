"""Ingest: group membership, validation, duplicates and one atomic commit per batch."""
