"""Records on the wire: formats, schema registry, and images referenced by URI."""
