"""The order in which steps visit the examples of a pool: the views of images, and runs of one domain.

Both are functions of what was drawn, of the recipe and of a seed, so that a resumed update visits the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

from updater.data.mixture import shuffled
from updater.data.pools import Example, Pair
from updater.recipes import Batches, Views


def visits(rows: Sequence[Example], most: int, views: Views, batches: Batches, seed: str) -> tuple[Example, ...]:
    """At most ``most`` visits of a pool: its rows in their order, and after them, in another one, each further view."""
    examples = list(islice(_with_views(rows, views, seed), most))
    if batches.domains == "mixed":
        return tuple(examples)
    return tuple(examples[place] for place in grouped([each.domain for each in examples], batches.group))


def _with_views(rows: Sequence[Example], views: Views, seed: str) -> Iterator[Example]:
    yield from rows
    for view in range(1, views.count):
        for place in shuffled(len(rows), f"{seed} view {view}"):
            row = rows[place]
            yield replace(row, view=view) if isinstance(row, Pair) else row


def grouped(domains: Sequence[str], size: int) -> list[int]:
    """An order of rows in which runs of at most ``size`` are of one domain.

    The rows of a domain keep their order, and its last run may be shorter. A run stands where its rows stood on
    average, so that in the first rows of the new order each domain has about its share of the old one.
    """
    own: dict[str, list[int]] = defaultdict(list)
    for place, domain in enumerate(domains):
        own[domain].append(place)
    runs = [places[start : start + size] for places in own.values() for start in range(0, len(places), size)]
    runs.sort(key=lambda run: (sum(run) / len(run), run[0]))
    return [place for run in runs for place in run]


def run_starts(domains: Sequence[str], size: int) -> tuple[int, ...]:
    """Where runs of one domain, of at most ``size`` rows, begin in an order of rows."""
    starts: list[int] = []
    for place, domain in enumerate(domains):
        if not starts or domain != domains[place - 1] or place - starts[-1] == size:
            starts.append(place)
    return tuple(starts)
