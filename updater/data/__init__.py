"""The data of an update: rows drawn from the sample store, the mixture of a batch, the order of visits."""
