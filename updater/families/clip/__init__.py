"""How a CLIP learns from pairs of an image and a text."""
