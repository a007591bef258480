"""Capacity planning from benchmark figures: ``ratchet admin plan``."""
