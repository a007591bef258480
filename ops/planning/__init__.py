"""Capacity for a load, from what benchmarks measured: ``ratchet admin plan``."""
