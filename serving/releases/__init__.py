"""Releases: types and protocol, residency, which release answers a request, and the guard that takes one back."""
