"""The command line. The only room of ``ops`` that knows the other parts; it imports them when a command needs them."""
