"""Capacity for a load, from what benchmarks measured: ``ratchet plan``."""
