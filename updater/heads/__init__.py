"""Heads: classes of labelled samples, learned in the image space of a candidate."""
