"""Small models, drawn pictures and real stores that benchmarks and tests make or start for themselves."""
