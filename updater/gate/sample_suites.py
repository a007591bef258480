"""Suites from held-out (`fresh_eval`) rows of the sample store.

Gain suites are of the newest rows: where an update may show that it learned something. Once the update is released they
become memory: retention suites of what earlier updates learned, a bounded reservoir for each domain, drawn by a hash of
the sample's id, so that the same rows of the store make the same suite, a further row displaces at most one, and a
deleted one is gone. A candidate's heads have retention suites of labelled rows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from core.errors import AdapterError
from core.settings import Settings
from serving.engines.heads import Head
from streams.store.sample_store import SampleStore
from updater.gate.held_out import TEXT_COLUMNS, HeldOut, Images, TableImages
from updater.gate.suite_items import (
    Item,
    asked_sample,
    caption_clusters,
    captioned_sample,
    image_clusters,
    labelled_sample,
    limited,
)
from updater.gate.suites import MAX_ITEMS, Family, Role, Suite, Task

CAPACITY: dict[Family, int] = {"clip": 1000, "vlm": 400}
"""Items of a suite; an answer of a VLM costs many times what a vector does. A loss of 5 points is excluded at 80% power
with some 160 where nothing was lost; where updates since took 3 points from the best release, it takes 1,000."""
MOST_DOMAINS = 12
"""Suites of single domains. All must pass, and each is asked of the candidate."""
PREFIX = "memory"
COLUMNS = ("id", "label", "domain", "concept")


def fresh_suite(
    rows: pa.Table,
    domain: str | None = None,
    *,
    family: Family = "clip",
    limit: int = MAX_ITEMS,
    seed: int = 0,
    images: Images | None = None,
) -> Suite:
    """A gain suite from rows with the columns id, domain, concept and text (or question and answer), and image where
    there are no ``images``.

    A CLIP is asked for retrieval both ways, where items with the same text count as each other's hits; a VLM is
    asked the questions, and its answers must match. Rows without a text (a question) are left out. `domain` takes
    only the rows of one domain.
    """
    images = images or TableImages(rows)
    by_domain = items_by_domain(rows, family, images)
    return _suite(by_domain.get(domain, []) if domain else _all(by_domain), domain, family, limit, seed, images)


def fresh_suites(
    rows: pa.Table,
    *,
    family: Family = "clip",
    min_items: int = 50,
    limit: int = MAX_ITEMS,
    most: int = 6,
    images: Images | None = None,
) -> list[Suite]:
    """One gain suite for each domain that asks at least `min_items` fresh captions (or images with questions), the
    largest `most` of them, and one over the rest, if it asks as many.

    If no domain has enough, one suite over all rows together; none if there are no rows. So hardly any row is left
    out, and with a further row there are not fewer items. Images are read of none but the items that are drawn.

    Args:
        limit: items of a suite.
        images: those of the rows; None where they have a column of them.
    """
    images = images or TableImages(rows)
    by_domain = items_by_domain(rows, family, images)
    suites: list[Suite] = []
    covered: set[str] = set()
    for domain in sorted(by_domain, key=lambda domain: (-len(by_domain[domain]), domain)):
        if len(by_domain[domain]) < min_items or len(suites) == most:
            break
        suite = _suite(by_domain[domain], domain, family, limit, 0, images)
        if domain and suite.units() >= min_items:
            suites.append(suite)
            covered.add(domain)
    others = _all({domain: items for domain, items in by_domain.items() if domain not in covered})
    rest = _suite(others, None, family, limit, 0, images)
    suites += [rest] if not suites or rest.units() >= min_items else []
    return [suite for suite in suites if len(suite.items()) >= 2]


def items_by_domain(rows: pa.Table, family: Family, images: Images) -> dict[str, list[Item]]:
    """Items by domain, in the order in which domains appear."""
    by_domain: dict[str, list[Item]] = defaultdict(list)
    make = captioned_sample if family == "clip" else asked_sample
    for row in rows.select([name for name in TEXT_COLUMNS if name in rows.column_names]).to_pylist():
        item = make(row, images)
        if item is not None:
            by_domain[row.get("domain") or ""].append(item)
    return dict(by_domain)


def _all(by_domain: Mapping[str, Sequence[Item]]) -> list[Item]:
    return [item for items in by_domain.values() for item in items]


def units(items: Sequence[Item], family: Family) -> int:
    """Clusters of items that are independent of each other."""
    return len(np.unique((caption_clusters if family == "clip" else image_clusters)(items)))


def store_suite(
    items: Sequence[Item],
    name: str,
    role: Role,
    family: Family,
    limit: int,
    seed: int,
    description: str,
    images: Images,
) -> Suite:
    """A suite over items of the sample store, at most `limit` of them."""
    task: Task = "retrieval" if family == "clip" else "vqa"
    suite = Suite(name=name, role=role, task=task, limit=limit, seed=seed, description=description)
    suite._items = tuple(limited(items, limit, seed))
    images.expect([item.sample_id for item in suite._items])
    return suite


def _suite(items: Sequence[Item], domain: str | None, family: Family, limit: int, seed: int, images: Images) -> Suite:
    name = slug(f"fresh.{domain}" if domain else "fresh")
    description = f"New {domain or 'samples'} that were never trained on."
    return store_suite(items, name, "gain", family, limit, seed, description, images)


def slug(name: str) -> str:
    """A domain's name as that of a suite."""
    return "".join(c if c.isalnum() or c in "_.-" else "-" for c in name.lower())[:64]


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


def head_suites(settings: Settings, store: SampleStore, version: int, heads: Mapping[str, Head]) -> list[Suite]:
    """A retention suite for each head of the candidate, asked by head, and by prompts where an incumbent or the base
    has none: so a head must not be worse than the one before it, nor than zero-shot classification. Raises AdapterError
    where one cannot be judged: the settings do not name it, or no held-out sample has its labels.
    """
    wanted = {head.name: head for head in settings.updater.heads}
    if not heads:
        return []
    if unknown := sorted(heads.keys() - wanted.keys()):
        raise AdapterError(f"nothing judges the head {unknown[0]!r} of the candidate.", "Name it in updater.heads.")
    held_out = HeldOut(store, version, None)
    rows = held_out.rows(COLUMNS).to_pylist()
    suites = []
    for name in sorted(heads):
        head, labels = wanted[name], set(heads[name].labels)
        own = [r for r in rows if r["label"] in labels and (not head.domains or r["domain"] in head.domains)]
        own.sort(key=lambda row: hashlib.sha256(f"head {row['id']}".encode()).digest())
        items = [labelled_sample(row, held_out) for row in own[: CAPACITY["clip"]]]
        if len(items) < 2:
            raise AdapterError(
                f"no held-out samples have the labels of the head {name!r}.", "Publish some with labels."
            )
        suite = Suite(
            name=f"head.{name}",
            role="retention",
            task="classification",
            head=name,
            limit=CAPACITY["clip"],
            description=f"Held-out samples with a label of the head {name}.",
        )
        suite._items = tuple(items)
        held_out.expect([item.sample_id for item in items])
        suites.append(suite)
    return suites
