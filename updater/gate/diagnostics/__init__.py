"""What a verdict tells beside its decision. Nothing here decides: it shows where a result comes from.

results              all of it, as plain data, and as text for a terminal
hard_pairs           pairs of images that the base cannot tell apart, and how many of them a model tells apart
diagnose             all of it for one gate run; a suite's result by how often its concepts were seen

How far the features of each tower moved is in `updater/gate/clip.py`, how often a VLM says yes in
`updater/gate/vlm.py`.
"""
