"""``ratchet bench search``: the catalog at a million vectors, beside faiss."""
