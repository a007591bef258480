"""The Serve graph's parts. Each is a plain class with a thin Ray shell around it."""
