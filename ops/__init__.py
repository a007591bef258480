"""What operators use: the command line, the console, dashboards, alerts and recovery."""
