"""`ratchet gate pairs`, as a function that a Python prompt can call too."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from core.errors import GateError
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from streams.store import SampleStore
from updater.data.draw import HAVING
from updater.gate.clip import ClipEvaluator
from updater.gate.diagnostics.hard_pairs import HardPair, hard_pairs
from updater.gate.held_out import TEXT_COLUMNS, HeldOut
from updater.gate.sample_suites import fresh_suites
from updater.gate.suite_items import Item
from updater.gate.suites import Suite, load_suites


@dataclass(frozen=True, slots=True)
class ListedPair:
    """A pair with its items."""

    pair: HardPair
    first: Item
    second: Item


def pairs_command(settings: Settings, name: str) -> list[ListedPair]:
    """Pairs of a retrieval suite that the CLIP base cannot tell apart, the most similar first.

    Args:
        name: of a suite of `gate.suites`, or `fresh.<domain>` over all held-out samples of the store.

    Raises:
        GateError: there is no such suite, or it cannot be read. BaseModelError: the base is not there.
    """
    suite = _suite(settings, name)
    evaluator = ClipEvaluator(
        ClipEngine.of(settings, load_base(settings.home, settings.base.clip), threads=settings.updater.threads)
    )
    items = suite.items()
    return [ListedPair(pair, items[pair.first], items[pair.second]) for pair in hard_pairs(evaluator.scorer, suite)]


def _suite(settings: Settings, name: str) -> Suite:
    suites = load_suites(settings.gate.suites, settings.home, "clip", settings.gate.max_items)
    known = [suite for suite in suites if suite.task == "retrieval"]
    for suite in chain(known, _fresh(settings) if name not in {suite.name for suite in known} else ()):
        if suite.name == name:
            return suite
    raise GateError(
        f"there is no retrieval suite {name[:64]!r}.",
        f"Name one of {', '.join(suite.name for suite in known) or 'gate.suites'}, or fresh.DOMAIN.",
    )


def _fresh(settings: Settings) -> list[Suite]:
    store = SampleStore(settings.lake)
    held_out = HeldOut(store, store.version(), HAVING["clip"])
    gate = settings.gate
    return fresh_suites(held_out.rows(TEXT_COLUMNS), min_items=gate.min_items, limit=gate.max_items, images=held_out)
