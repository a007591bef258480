"""The deployments of the Serve graph: thin Ray shells around plain classes."""
