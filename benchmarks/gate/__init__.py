"""``ratchet bench gate``: the gate's error rates, on candidates that were really trained.

plans       bad and good candidates, from mild to strong; training_data: their training pairs
trial       trains one with the updater's own trainer, and keeps its outcomes in a file (engine: quick scoring)
margin      candidates near the margin, between the base and a bad one (scaling: W + s ΔW of an adapter)
stock       all candidates of a run: trained, or read from the outcomes that an earlier run kept
mislabelled candidates of a producer whose labels are false, in the held-out items too
population  all items of each suite that no candidate trains on: they decide what is true of a candidate
cases       truth and verdict of one candidate, the latter by the gate's own decision on the suites' own draw
redrawn     items split repeatedly between the gate and a truth that it never sees
resample    other draws of items, also under exact no change and exactly at the margin
counting    false accepts, false rejects and the slow drift; power, plot: how many items a suite needs
lineage     simulated lineages whose items are used again and again (lineage_world: their models and answers;
            lineage_report: their figures)

A killed run resumes without training anything twice. The engineering checks are left out of the verdicts; they can only
keep more candidates out.
"""

from __future__ import annotations

from benchmarks.gate.bench import main, run

__all__ = ["main", "run"]
