"""Adapters from elsewhere and for elsewhere: PEFT directories in and out, through the same gate and rollout."""
