"""What an update learns from: rows drawn from the sample store, the mixture of a batch, the order of visits."""
