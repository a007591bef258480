"""Engines: plain Python that turns pixels and text into vectors. No Ray, no HTTP."""
