"""Cost of training, the steps that a budget pays for, and the share of time that serving leaves to it."""
