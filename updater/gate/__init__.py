"""The gate: zero-shot suites and statistical tests that a candidate must pass before it is served; see run.py."""
