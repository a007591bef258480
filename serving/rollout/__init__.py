"""Canaries, shadows and the guard: who is answered by which release, and when a release is taken back."""
