"""Retention suites of a candidate's heads: held-out labelled samples, asked by head, and by prompts where an incumbent
or the base has none. So a head must not be worse than the one before it, nor than zero-shot classification."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from core.errors import AdapterError
from core.settings import Settings
from serving.engines.heads import Head
from streams.store import SampleStore
from updater.gate.held_out import HeldOut
from updater.gate.memory_suites import CAPACITY
from updater.gate.suite_items import labelled_sample
from updater.gate.suites import Suite

COLUMNS = ("id", "label", "domain", "concept")


def head_suites(settings: Settings, store: SampleStore, version: int, heads: Mapping[str, Head]) -> list[Suite]:
    """One for each head of the candidate. Raises AdapterError where one cannot be judged: the settings do not name it,
    or no held-out sample has its labels."""
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
