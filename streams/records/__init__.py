"""A record on the wire: its formats, its schema registry, and the pictures that it names by URI."""
