"""What training costs, what a budget pays for, and the share of time that serving leaves to it."""
