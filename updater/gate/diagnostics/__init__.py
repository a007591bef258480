"""What a verdict tells beside its decision. Nothing here decides: it shows where a result comes from.

results              all of it, as plain data
concept_counts       how often the sample store's training split names a concept
tail                 a suite's result by that number
hard_pairs           pairs of images that the base cannot tell apart, though their captions differ
pair_accuracy        how many of them a model tells apart
feature_shift        how far the features of each tower moved
yes_share            how often a VLM says yes, beside how often it should
diagnose             all of it for one gate run
lines                the same as text, for a terminal
diagnostics_command  `ratchet gate pairs`
"""
