"""Continual-learning methods from papers, as plugins of Ratchet's updater (see docs/methods.md)."""
