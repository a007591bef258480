"""What makes a record a sample: its checks, its twins in the store, and the split that it belongs to."""
