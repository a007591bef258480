"""The candidates: forty that should be rejected, and forty that should be accepted.

Every kind goes from mild to strong, so that some of each are near the margin. The intention of a candidate decides
nothing; its outcomes on all held-out items do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from updater.recipes import Recipe, load_recipe

Lie = Literal["", "shuffled", "poisoned", "forgotten", "mislabelled"]
NEW = ("fluent3d", "pixel_mshock", "fluent_mono")
"""Domains that the updates learn and the base has not seen."""
KNOWN = ("noto", "pixel_ultica", "openclipart")
"""Domains that the base knows, for whose training split there can be false captions."""
BAD = ("naive", "rate", "shuffled", "poisoned", "forgotten")
GOOD = ("first", "second")
DRIFT = "drift"
MARGIN = "margin"
"""A bad candidate whose change of the weights is scaled until its loss is near the margin (module margin)."""
MISLABELLED = "mislabelled"
"""One whose producer labels the new domain systematically wrong, in the pairs and in the held-out items."""
STRENGTHS = (2e-3, 6e-3)
"""Peak rates of the mislabelled."""
NEW_PAIRS = 250
GALLERY = {
    "clipart_retrieval": 320, "emoji_retrieval": 280, "fashion_classes": 320, "flags_retrieval": 250,
    "pixel_classes": 400, "pixel_retrieval": 400, "stamp_classes": 400,
}  # fmt: skip
"""Size of the galleries in which the items of a shipped suite are asked."""
CHAIN = 10
"""Updates of the slow drift, each from the one before."""


@dataclass(frozen=True, slots=True)
class GatePlan:
    """One candidate: its training and data."""

    name: str
    kind: str
    recipe: Recipe
    domain: str
    """The domain that it learns, and where it has to show a gain."""
    new: int
    seed: int
    lie: Lie = ""
    share: float = 0.0
    """Share of the new pairs that are false about what the base knows."""
    victim: str = ""
    """The known domain of the false pairs; all when empty."""
    incumbent: str = ""
    """Name of the plan that it continues; the base when empty."""
    scale: float = 1.0
    """Factor on the trained change of the weights."""


def plans(bad: int, good: int) -> list[GatePlan]:
    """This many of each, the drift's chain among the bad ones; an incumbent comes before its continuations.

    Those of a smaller call are among those of a larger one. Raises ValueError when there are too few to have one of
    each kind.
    """
    if bad < CHAIN + len(BAD) or good < len(GOOD):
        raise ValueError(f"at least {CHAIN + len(BAD)} bad and {len(GOOD)} good candidates show every kind")
    kinds = {**_places(GOOD, good), **_places(BAD, bad - CHAIN)}
    in_turn = sorted((place, kind) for kind, count in kinds.items() for place in range(count))
    return [*(_drift(number) for number in range(CHAIN)), *(_one(kind, place) for place, kind in in_turn)]


def plans_mislabelled(count: int) -> list[GatePlan]:
    """One for each new domain in turn, at the first strength, then at the second."""
    return [
        GatePlan(
            f"{MISLABELLED}-{place:02d}", MISLABELLED,
            _recipe("default", **_rate(STRENGTHS[place // len(NEW) % len(STRENGTHS)])),
            NEW[place % len(NEW)], NEW_PAIRS, 100 * (len((*GOOD, *BAD)) + 1) + place, lie="mislabelled",
        )
        for place in range(count)
    ]  # fmt: skip


def family(name: str) -> str:
    """A name shared by candidates that are not independent: the scaled ones of one parent, an update and the one
    that continues it, and the whole slow drift."""
    kind, _, number = name.partition("x")[0].partition("-")
    return {DRIFT: DRIFT, "second": f"first-{number}"}.get(kind, f"{kind}-{number}")


def _places(kinds: Sequence[str], count: int) -> dict[str, int]:
    return {kind: len(range(number, count, len(kinds))) for number, kind in enumerate(kinds)}


def _one(kind: str, place: int) -> GatePlan:
    """The candidate of a kind with a number: strengths alternate between mild and strong."""

    def between(low: float, high: float) -> float:
        return float(low * (high / low) ** _spread(place))

    name, seed = f"{kind}-{place:02d}", 100 * ((*GOOD, *BAD).index(kind) + 1) + place
    domain, half = NEW[(place // 3 + place) % len(NEW)], {"reference": 0.2, "new": 0.8, "replay": 0.0}
    towers: dict[str, Any] = ({}, {"image": {"locked": True}}, {"text": {"locked": True}})[place % 3]
    match kind:
        case "first":
            recipe = _recipe("default", **_rate(between(8e-4, 3e-3)), **towers)
            return GatePlan(name, kind, recipe, domain, NEW_PAIRS, seed)
        case "second":
            recipe, domain = _recipe("default", **_rate(between(8e-4, 3e-3))), NEW[(place // 3 + place + 1) % len(NEW)]
            return GatePlan(name, kind, recipe, domain, NEW_PAIRS, seed, incumbent=f"first-{place:02d}")
        case "naive":
            return GatePlan(name, kind, _recipe("naive", **_rate(between(2e-3, 1e-2))), domain, NEW_PAIRS, seed)
        case "rate":
            return GatePlan(name, kind, _recipe("default", **_rate(between(1e-2, 1e-1))), domain, NEW_PAIRS, seed)
        case "shuffled":
            recipe = _recipe("naive", **_rate(between(1e-3, 5e-3)))
            return GatePlan(name, kind, recipe, domain, NEW_PAIRS, seed, lie="shuffled")
        case "poisoned":
            recipe = _recipe("default", **_rate(8e-3), mixture=half)
            return GatePlan(name, kind, recipe, domain, NEW_PAIRS, seed, lie="poisoned", share=between(0.3, 0.9))
        case _:
            recipe = _recipe("default", **_rate(between(4e-3, 1e-2)), mixture=half)
            victim = KNOWN[place % len(KNOWN)]
            return GatePlan(name, kind, recipe, domain, NEW_PAIRS, seed, lie="forgotten", share=0.5, victim=victim)


def _drift(number: int) -> GatePlan:
    """One update of the chain: a small step away from what the base knew, without regularization."""
    recipe = _recipe("naive", **_rate(2.5e-4), max_steps=15)
    incumbent = f"{DRIFT}-{number - 1:02d}" if number else ""
    return GatePlan(f"{DRIFT}-{number:02d}", DRIFT, recipe, NEW[number % len(NEW)], 100, number, incumbent=incumbent)


def _spread(place: int) -> float:
    """1/2, 1/4, 3/4, 1/8, 5/8, ...: any prefix is evenly spread over (0, 1) (van der Corput)."""
    digits = f"{place + 1:b}"[::-1]
    return float(int(digits, 2) / 2 ** len(digits))


def _rate(peak: float) -> dict[str, Any]:
    return {"schedule": {"peak": peak, "constant": peak, "final": peak / 5}}


def _recipe(shipped: str, schedule: dict[str, Any], **changes: Any) -> Recipe:
    """A shipped recipe made small: the last block of each tower learns, so that steps start at a cached boundary."""
    values = load_recipe(shipped).model_dump(mode="json")
    short = {"warmup_steps": 5, "cooldown_steps": 10, "anneal_steps": 10}
    small = {"image": {"blocks": 1}, "text": {"blocks": 1}, "batch_size": 48, "max_steps": 40, "reference_limit": 300}
    return Recipe.parse({**values, **small, **changes, "schedule": values["schedule"] | short | schedule})
