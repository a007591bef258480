"""Releases: types, protocol, residency, admission of requests, and the guard that rolls back."""
