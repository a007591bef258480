"""The methods that recipes name, one file each: objectives, regularizers, merging and optimizers."""
