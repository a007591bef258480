"""The HTTP surface: ingress, routes with their bodies, authentication, limits, images, and calls to replicas."""
