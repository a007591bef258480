"""``ratchet bench variety``: streams of one kind each, from a producer to an adapter."""
