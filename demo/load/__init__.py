"""HTTP load whose every answer is checked: what the demo, the benchmarks and the tests put on a server."""
