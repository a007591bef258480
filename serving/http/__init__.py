"""The HTTP surface: routes, schemas, authentication, limits, image loading.

No Ray here but in the calls it is given.
"""
