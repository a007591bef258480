"""The run of one update: pinned data, recipe and seed in, an adapter directory out."""
