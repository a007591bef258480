"""The demo's data, and the shipped models, made from packages of registries."""
