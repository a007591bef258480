"""``ratchet demo``: the whole loop on real data, told as a story, checked as it goes."""
