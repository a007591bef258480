"""The console: a server-rendered web page for operators and first-time visitors."""
