"""``ratchet bench lifetime``: forty consecutive updates under the gate's own rules, and what remains of them.

outcomes  results of real updates on real items, stored by `ratchet bench gate`
moves     simulated updates that move ranks in the same way, with a known true change
world     suites and domains with all their items; candidates that learn, forget and harm
evaluation  the gate's suites and decision about them
audits    the gate's audit of a simulated release on sealed items; what a model truly lost
churn     how many answers of a simulated chain differ from the base's
schedule  when a candidate is trained and evaluated, and at which level
stream    one updater over many lessons; report: figures of several streams

Nothing is trained, and no model runs: ranks stand for models.
"""

from __future__ import annotations

from benchmarks.lifetime.run_lifetime import main, run

__all__ = ["main", "run"]
