"""The command line. The only package of ``ops`` that knows the other parts; commands import them when needed."""
