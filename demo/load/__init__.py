"""HTTP load for demo, benchmarks and tests; every answer is checked."""
