"""``ratchet bench lifetime``: forty updates, one after another, by the gate's own rules, and what is left of them.

outcomes  what real updates did to real items, as `ratchet bench gate` kept it
moves     simulated updates that move ranks as those did, with a true change that is known
world     suites and domains with all their items; candidates that learn, forget and harm
evaluation  the gate's suites and decision about them
schedule  when a candidate is trained and evaluated, and at which level
stream    one updater over many lessons; report: figures of several streams

Nothing is trained, and no model runs: ranks stand for models.
"""

from __future__ import annotations

from benchmarks.lifetime.run_lifetime import main, run

__all__ = ["main", "run"]
