"""Kafka clients, fetching that survives damaged batches, the fenced outbox, events, and an embedded broker."""
