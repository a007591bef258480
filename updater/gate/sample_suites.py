"""Gain suites from `fresh_eval` rows of the sample store: where an update may show that it learned something."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from updater.gate.held_out import TEXT_COLUMNS, Images, TableImages
from updater.gate.suite_items import Item, asked_sample, caption_clusters, captioned_sample, image_clusters, limited
from updater.gate.suites import MAX_ITEMS, Family, Role, Suite, Task


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
