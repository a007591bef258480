"""The papers' methods of continual learning, as plugins of Ratchet's updater: see docs/methods.md."""
