"""The candidates: forty that should be kept out, and forty that should get in.

Every kind goes from mild to strong, so that some of each lie near the margin: what a candidate is meant to be decides
nothing, its outcomes on all held-out items do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from updater.recipes import Recipe, load_recipe

Lie = Literal["", "shuffled", "poisoned", "forgotten"]
NEW = ("fluent3d", "pixel_mshock", "fluent_mono")
"""What the updates learn: domains that the base has not seen."""
KNOWN = ("noto", "pixel_ultica", "openclipart")
"""Domains that the base knows, whose training split can be lied about."""
BAD = ("naive", "rate", "shuffled", "poisoned", "forgotten")
GOOD = ("first", "second")
DRIFT = "drift"
CHAIN = 10
"""Updates of the slow drift, each from the one before."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One candidate: how it is trained, and on what."""

    name: str
    kind: str
    recipe: Recipe
    domain: str
    """What it learns, and where it has to show a gain."""
    new: int
    """New pairs."""
    seed: int
    lie: Lie = ""
    share: float = 0.0
    """Of the new pairs, those that are lies about what the base knows."""
    victim: str = ""
    """The known domain that they are about; all when empty."""
    incumbent: str = ""
    """Name of the plan that it goes on from; the base when empty."""


def plans(bad: int, good: int) -> list[Plan]:
    """So many of each, the drift's chain among the bad ones; an incumbent comes before what goes on from it.

    Raises ValueError when there are too few to have one of each kind.
    """
    if bad < CHAIN + len(BAD) or good < len(GOOD):
        raise ValueError(f"at least {CHAIN + len(BAD)} bad and {len(GOOD)} good candidates show every kind")
    return [*_good(good), *_bad(bad - CHAIN), *_drift()]


def _good(count: int) -> list[Plan]:
    first = (count + 1) // 2
    towers: tuple[dict[str, Any], ...] = ({}, {"image": {"locked": True}}, {"text": {"locked": True}})
    found = []
    for number in range(count):
        again = number >= first
        place = number - first if again else number
        rate = _between(5e-4, 2e-3, place, first)
        changes = _rate(rate) | (towers[place % 3] if not again else {})
        domain = NEW[(place // 3 + place + again) % len(NEW)]
        found.append(
            Plan(
                name=f"{GOOD[again]}-{place:02d}",
                kind=GOOD[again],
                recipe=_recipe("default", **changes),
                domain=domain,
                new=250,
                seed=number,
                incumbent=f"{GOOD[0]}-{place:02d}" if again else "",
            )
        )
    return found


def _bad(count: int) -> list[Plan]:
    each = -(-count // len(BAD))
    return [_one_bad(BAD[number % len(BAD)], number // len(BAD), each, seed=1000 + number) for number in range(count)]


def _one_bad(kind: str, place: int, each: int, seed: int) -> Plan:
    def between(low: float, high: float) -> float:
        return _between(low, high, place, each)

    name, domain = f"{kind}-{place:02d}", NEW[place % len(NEW)]
    half = {"reference": 0.2, "new": 0.8, "replay": 0.0}
    match kind:
        case "naive":
            return Plan(name, kind, _recipe("naive", **_rate(between(2e-3, 1e-2))), domain, 250, seed)
        case "rate":
            return Plan(name, kind, _recipe("default", **_rate(between(1e-2, 1e-1))), domain, 250, seed)
        case "shuffled":
            recipe = _recipe("naive", **_rate(between(1e-3, 5e-3)))
            return Plan(name, kind, recipe, domain, 250, seed, lie="shuffled")
        case "poisoned":
            recipe = _recipe("default", **_rate(4e-3), mixture=half)
            return Plan(name, kind, recipe, domain, 250, seed, lie="poisoned", share=between(0.3, 0.9))
        case _:
            recipe = _recipe("default", **_rate(between(2e-3, 6e-3)), mixture=half)
            victim = KNOWN[place % len(KNOWN)]
            return Plan(name, kind, recipe, domain, 250, seed, lie="forgotten", share=0.5, victim=victim)


def _drift() -> list[Plan]:
    recipe = _recipe("naive", **_rate(8e-4), max_steps=15)
    return [
        Plan(
            name=f"{DRIFT}-{number:02d}",
            kind=DRIFT,
            recipe=recipe,
            domain=NEW[number % len(NEW)],
            new=100,
            seed=2000 + number,
            incumbent=f"{DRIFT}-{number - 1:02d}" if number else "",
        )
        for number in range(CHAIN)
    ]


def _between(low: float, high: float, place: int, count: int) -> float:
    """From ``low`` to ``high`` in equal ratios; a single one is in the middle."""
    return float(low * (high / low) ** (place / (count - 1) if count > 1 else 0.5))


def _rate(peak: float) -> dict[str, Any]:
    return {"schedule": {"peak": peak, "constant": peak, "final": peak / 5}}


def _recipe(shipped: str, schedule: dict[str, Any], **changes: Any) -> Recipe:
    """A shipped recipe made small: the last block of each tower learns, so that steps start at a kept boundary."""
    values = load_recipe(shipped).model_dump(mode="json")
    short = {"warmup_steps": 5, "cooldown_steps": 10, "anneal_steps": 10}
    small = {"image": {"blocks": 1}, "text": {"blocks": 1}, "batch_size": 48, "max_steps": 40, "reference_limit": 300}
    return Recipe.parse({**values, **small, **changes, "schedule": values["schedule"] | short | schedule})
