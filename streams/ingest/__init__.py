"""From a topic to the sample store: membership, validation, duplicates and one atomic commit per batch."""
