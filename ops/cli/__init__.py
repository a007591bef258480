"""The command line. The only package of ``ops`` that knows the other parts; it imports them when a command needs
them."""
