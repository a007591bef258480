"""Data of the demo, and the models that are shipped: made from packages of registries."""
