"""Operators' tools: command line, console, dashboards, alerts and recovery."""
