"""Rules by which what was trained joins what is served."""
