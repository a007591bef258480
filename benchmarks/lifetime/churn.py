"""The share of a simulated chain's answers that differ from the base's."""

from __future__ import annotations

from itertools import cycle, islice

import numpy as np

from benchmarks.lifetime.moves import Generator
from benchmarks.lifetime.world import FORGOTTEN, World

GAIN = 0.03


def churn_of_chain(world: World, updates: int, rng: Generator) -> list[float]:
    """Share of answers to static retrieval suites that differ from the base's, after each update of a chain in which
    everything is released."""
    asked = [domain for domain in world.static if domain.suite.task == "retrieval"]
    model, differing = world.base, []
    for learned in islice(cycle(world.streamed), updates):
        model = world.candidate(model, {learned.name: GAIN}, {}, FORGOTTEN, rng)
        hits = [(model[d.name] < d.suite.k) != (world.base[d.name] < d.suite.k) for d in asked]
        differing.append(float(np.mean([each.mean() for each in hits])))
    return differing
