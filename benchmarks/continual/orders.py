"""Orders of a stream: as listed, random, by similarity of neighbours, and by how common their words are (as in
FoMo-in-Flux, Roth et al. 2024, by whole updates instead of concepts).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.plan import Lessons

ORDERS = ("listed", "random", "similar", "unlike", "common")
"""By number. *similar*: each update is followed by the one most like it; *unlike*: by the one least like it; *common*:
first those whose words are most frequent in the reference pool."""

CHAINS = ((0, 0), (1, 1), (2, 2), (3, 0), (4, 1))
"""Order and seed of each chain of a method: five orders and three seeds."""

Means = Mapping[str, NDArray[np.float32]]
"""By update, the mean of unit features of its pictures by the base."""


def order_of(lessons: Lessons, number: int, means: Callable[[], Means]) -> list[str]:
    """Names of the updates in order ``number``; numbers beyond :data:`ORDERS` are more random ones."""
    names = list(lessons.updates)
    kind = ORDERS[number] if number < len(ORDERS) else "random"
    if kind == "random":
        random.Random(f"order {number}").shuffle(names)  # noqa: S311
    elif kind in ("similar", "unlike"):
        names = _neighbours(names, means(), nearest=kind == "similar")
    elif kind == "common":
        names = _common(lessons)
    return names


def _neighbours(names: list[str], means: Means, nearest: bool) -> list[str]:
    unit = {name: means[name] / np.linalg.norm(means[name]) for name in names}
    chain, left = names[:1], names[1:]
    while left:
        likeness = {name: float(unit[chain[-1]] @ unit[name]) for name in left}
        chain.append((max if nearest else min)(left, key=likeness.__getitem__))
        left.remove(chain[-1])
    return chain


def _common(lessons: Lessons) -> list[str]:
    known = Counter(word for pair in lessons.reference for word in _words(pair.text))

    def familiar(name: str) -> float:
        words = [word for pair in lessons.updates[name] for word in _words(pair.text)]
        return float(np.mean([np.log1p(known[word]) for word in words])) if words else 0.0

    return sorted(lessons.updates, key=lambda name: -familiar(name))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]{3,}", text.lower())
