"""Merge rules: how a trained adapter is combined with the served one."""
