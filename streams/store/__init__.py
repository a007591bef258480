"""The sample store: tables of Lance, the writer that commits a batch with its position, maintenance and deletion."""
