"""A private Ray session for one machine, the corrections that Ray Serve and HAProxy need for it, and calls through Ray
handles.
"""
