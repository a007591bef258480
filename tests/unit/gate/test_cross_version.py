"""Recall of a candidate's texts among the incumbent's images, on vectors that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from updater.gate.clip import ClipEvaluator
from updater.gate.suite_items import Item
from updater.gate.suites import Suite

N, DIM = 120, 64
LEVEL = {"margin": 0.05, "level": 0.05}


class GivenVectors:
    """Vectors of each model: an image and its text are equal but for noise; models differ by a rotation."""

    def __init__(self, turned: dict[str | None, float]) -> None:
        """``turned``: share of another rotation in each model's space."""
        self.turned = turned
        self.engine = SimpleNamespace(spaces=lambda name: SimpleNamespace(image=f"space {turned[name]}"))

    def images(self, items: list[Item], adapter: str | None, label: str = "") -> np.ndarray:
        return self._vectors([item.text for item in items], adapter, 1)

    def texts(self, texts: list[str], adapter: str | None, label: str = "") -> np.ndarray:
        return self._vectors(texts, adapter, 2)

    def _vectors(self, texts: list[str], adapter: str | None, side: int) -> np.ndarray:
        content = np.stack([np.random.default_rng(int(text)).normal(size=DIM) for text in texts])
        noise = np.stack([np.random.default_rng([int(text), side]).normal(size=DIM) for text in texts])
        turn = np.random.default_rng(9).normal(size=(DIM, DIM)) / np.sqrt(DIM)
        share = self.turned[adapter]
        vectors = (content + 0.3 * noise) @ ((1 - share) * np.eye(DIM) + share * turn)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def suite() -> Suite:
    suite = Suite(name="fresh", role="gain", task="retrieval", limit=N, seed=0, description="")
    suite._items = tuple(Item(f"i{n}", str(n), str(n), f"i{n}", f"i{n}", bytes) for n in range(N))
    return suite


def measure(candidate: float, **settings: Any) -> Any:
    scorer: Any = GivenVectors({None: 0.0, "clip-new": candidate})
    return ClipEvaluator.cross_version(scorer, [suite()], None, "clip-new", **{**LEVEL, **settings})


def test_a_space_that_hardly_moved_may_be_searched_at_once() -> None:
    crossing = measure(0.02)
    assert crossing.n == N and crossing.allowed
    assert crossing.new_old == pytest.approx(crossing.old_old, abs=0.02)


def test_a_space_of_another_rotation_may_not() -> None:
    crossing = measure(1.0)
    assert crossing.new_old < 0.2 < crossing.new_new and not crossing.allowed
    assert crossing.summary()["allowed"] is False


def test_few_items_prove_nothing() -> None:
    assert not measure(0.0001, margin=0.001).allowed


def test_an_update_of_the_text_tower_alone_has_no_such_question() -> None:
    assert measure(0.0) is None
