"""A private Ray session for one machine, corrections to Ray Serve and HAProxy, and calls through Ray handles."""
