"""The sample store: Lance tables, the writer that commits a batch with its position, maintenance and deletion."""
