"""Another CLIP base: everything that was learned is learned anew on it, judged across bases, and released.

replay      records an upgrade: an update that begins at nothing, over what the live adapter has learned
estimate    what it would cost: one batch is measured
lineage     why an updater waits because of a base
switch      the release that changes the base, either way
"""
