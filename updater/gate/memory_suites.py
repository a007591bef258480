"""Retention suites of what earlier updates learned: held-out samples of the data that the live adapter has learned.

The gate asks the newest `fresh_eval` rows whether something was gained. Once the update is released they become memory:
a bounded reservoir for each domain, drawn by a hash of the sample's id, so that the same rows of the store make the
same suite, a further row displaces at most one, and a deleted one is gone.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from updater.gate.held_out import Images, TableImages
from updater.gate.sample_suites import items_by_domain, slug, store_suite, units
from updater.gate.suites import Family, Suite

CAPACITY: dict[Family, int] = {"clip": 1000, "vlm": 400}
"""Items of a suite; an answer of a VLM costs many times what a vector does. A loss of 5 points is excluded at 80% power
with some 160 where nothing was lost; where updates since took 3 points from the best release, it takes 1,000."""
MOST_DOMAINS = 12
"""Suites of single domains. All must pass, and each is asked of the candidate."""
PREFIX = "memory"


def choose_memory(rows: pa.Table, family: Family, min_units: int) -> dict[str, list[str]]:
    """Ids of the samples of each memory suite, by its name.

    The largest domains with at least `min_units` samples have a suite each; the rest of the domains, and samples
    without one, are one suite together. Which rows are chosen does not depend on their order.

    Args:
        rows: columns id and domain of all held-out samples of the data that was learned.
        min_units: items that a suite must have; with fewer no suite can exclude a loss, and every update would wait.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for name, domain in zip(rows["id"].to_pylist(), rows["domain"].to_pylist(), strict=True):
        by_name[slug(f"{PREFIX}.{domain}") if domain else PREFIX].append(name)
    single = {name: ids for name, ids in by_name.items() if name != PREFIX and len(ids) >= min_units}
    largest = sorted(single, key=lambda name: (-len(single[name]), name))[:MOST_DOMAINS]
    rest = [each for name, ids in by_name.items() if name not in largest for each in ids]
    groups = {**{name: single[name] for name in sorted(largest)}, PREFIX: rest}
    return {name: reservoir(ids, CAPACITY[family]) for name, ids in groups.items() if len(ids) >= min_units}


def reservoir(ids: Sequence[str], capacity: int) -> list[str]:
    """The `capacity` ids whose hashes are smallest."""
    return sorted(ids, key=lambda name: hashlib.sha256(f"{PREFIX} {name}".encode()).digest())[:capacity]


def memory_suites(
    rows: pa.Table, chosen: dict[str, list[str]], family: Family, min_units: int, images: Images | None = None
) -> list[Suite]:
    """The suites of :func:`choose_memory` from the rows that it chose. Those with fewer independent items than
    `min_units` are left out. `images`: those of the rows; None where they have a column of them.
    """
    images = images or TableImages(rows)
    by_id = {item.sample_id: item for items in items_by_domain(rows, family, images).values() for item in items}
    suites = []
    for name, ids in chosen.items():
        items = [by_id[each] for each in ids if each in by_id]
        images.expect([item.sample_id for item in items])
        if len(items) >= 2 and units(items, family) >= min_units:
            about = f"Samples of {name.removeprefix(f'{PREFIX}.')} that" if name != PREFIX else "Other samples that"
            description = f"{about} released updates were judged by, and that were never trained on."
            suites.append(store_suite(items, name, "retention", family, CAPACITY[family], 0, description, images))
    return suites


def learned_before(rows: pa.Table, fresh: pa.Table) -> pa.Table:
    """The rows that are not among the fresh ones; both have a column id."""
    known = set(fresh["id"].to_pylist())
    return rows.filter(np.array([name not in known for name in rows["id"].to_pylist()], dtype=bool))
