"""An updater before far more pending samples than its budget pays for."""
