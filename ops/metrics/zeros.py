"""Counters that alerts watch exist from the start, with 0 for every value of their labels.

Prometheus sees growth, not birth: for a counter that appears with the value 1, ``increase()`` is 0. Without this the
first failed release, the first dead engine and the first verdict would raise no alert.
"""

from __future__ import annotations

from itertools import product

from ops.metrics import declared as d

FAMILIES = ("clip", "vlm")
START = (
    (d.INGEST_STORED, (("train", "fresh_eval"),)),
    (d.INGEST_DUPLICATES, (("exact", "perceptual"),)),
    (d.UPDATES, (FAMILIES, ("done", "failed", "abandoned"))),
    (d.GATE_VERDICTS, (FAMILIES, ("passed", "rejected", "inconclusive"))),
    (d.RELEASES, (("initial", "update", "rollback", "release"), ("committed", "failed"))),
    (d.VLM_REQUESTS, (("reply", "stream", "score"), ("ok", "late", "ask", "adapter", "gone", "dead"))),
)
"""Counters, and the values of each of their labels."""


def start() -> None:
    """Bring them into being; adds nothing to those that have counted already."""
    for counter, values in START:
        for each in product(*values):
            counter.labels(*each)
