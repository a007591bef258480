"""Penalties on parameters."""
