"""From a topic to the sample store: Kafka, quality checks and one atomic commit per batch."""
