"""The HTTP surface: routes, schemas, authentication, limits, image loading.

Ray is in the modules of calls alone (``encoder_calls``, ``vlm_calls``, ``catalog_calls``, ``controller_calls``).
"""
