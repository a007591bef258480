"""How much of everything a load needs, from what benchmarks measured: ``ratchet admin plan``."""
