"""Recipes (YAML files) that use these methods, or vary the shipped recipes."""
