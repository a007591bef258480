"""The HTTP surface: the ingress process, routes with their bodies, authentication, limits, image loading, calls to
replicas.
"""
