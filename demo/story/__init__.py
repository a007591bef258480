"""``ratchet demo``: the whole loop on real data, as a story that is checked while it runs."""
