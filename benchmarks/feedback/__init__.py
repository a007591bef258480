"""``ratchet bench feedback``: what callers report reaches learning and guard, and a bad source cannot."""
