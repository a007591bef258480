"""Another CLIP base: everything that was learned is learned anew on it, judged across bases, and released.

replay      plans an upgrade and records it: an update that begins at nothing, over what the live adapter has learned
switch      the release that changes the base, either way
"""
