"""A private Ray session for one machine, and what is put right in Ray Serve and HAProxy for it."""
