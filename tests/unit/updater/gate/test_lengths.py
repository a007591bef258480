"""Shorter vectors: which lengths keep the gate's suites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.settings.updates import Gate
from serving.engines.calibration import shortened
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.calibration import kept_lengths
from updater.gate.score import Scorer, Vectors
from updater.gate.suite_items import Item
from updater.gate.suites import Suite


class Placed(Scorer):
    """Embeds classes and captions as one-hot vectors from a place on: shorter vectors know the first of them only."""

    def __init__(self, engine: ClipEngine, place: int, cache: Path | None = None) -> None:
        super().__init__(engine, cache)
        self.place = place

    def _encoded(self, items: Sequence[Any], *_: Any) -> Iterator[tuple[Sequence[Any], Vectors]]:
        texts = [item.text if isinstance(item, Item) else item for item in items]
        numbers = [int(text.rstrip(".").replace("_", " ").split()[-1]) % 4 for text in texts]
        vectors = np.zeros((len(items), self.engine.base.dim), np.float32)
        vectors[:, 0] = 0.1  # what all have in common
        vectors[np.arange(len(items)), [self.place + number for number in numbers]] += 1
        yield items, vectors


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ClipEngine:
    return ClipEngine(tiny_base(tmp_path_factory.mktemp("base")), threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(folder_dataset(tmp_path_factory.mktemp("data") / "things", count=80))


def kinds(data: str, **more: object) -> Suite:
    return Suite.model_validate({"name": "kinds", "task": "classification", "data": data, **more})


@pytest.mark.parametrize(("place", "kept"), [(0, (16, 8, 4)), (2, (16, 8)), (6, (16,)), (14, ()), (20, ())])
def test_lengths_are_kept_down_to_the_first_that_loses_a_suite(
    engine: ClipEngine, data: str, place: int, kept: tuple[int, ...]
) -> None:
    assert engine.base.dim == 32
    assert kept_lengths(Placed(engine, place), [kinds(data)], None, Gate()) == kept


def test_a_suite_has_its_own_margin_and_every_suite_must_stay_inside(engine: ClipEngine, data: str) -> None:
    half = Placed(engine, 14)  # two of four classes are lost at half the length
    assert kept_lengths(half, [kinds(data, margin=0.9)], None, Gate()) == (16,)
    assert kept_lengths(half, [kinds(data, margin=0.9), kinds(data, name="strict")], None, Gate()) == ()
    new = kinds(data, name="fresh.things", role="gain")
    assert kept_lengths(half, [kinds(data, margin=0.9), new], None, Gate()) == ()
    assert kept_lengths(Placed(engine, 0), [kinds(data), new], None, Gate()) == (16, 8, 4)


def test_without_enough_items_of_what_must_not_be_lost_nothing_is_kept(engine: ClipEngine, data: str) -> None:
    sound = Placed(engine, 0)
    assert kept_lengths(sound, [kinds(data, role="gain")], None, Gate()) == ()
    assert kept_lengths(sound, [kinds(data)], None, Gate(min_items=81)) == ()
    assert kept_lengths(sound, [kinds(data), kinds(data, name="few", limit=40)], None, Gate()) == ()


def test_a_suite_that_a_head_answers_is_left_out(engine: ClipEngine, data: str) -> None:
    half, own = Placed(engine, 14), kinds(data, name="own", head="own")
    assert kept_lengths(half, [kinds(data, margin=0.9), own], None, Gate()) == (16,)


def test_scores_of_short_vectors_are_kept_apart_from_those_of_whole_ones(
    engine: ClipEngine, data: str, tmp_path: Path
) -> None:
    whole = Placed(engine, 14, tmp_path)
    suite = kinds(data)
    assert whole.score(suite, None).hits.mean() == 1.0
    assert whole.shorter(16).score(suite, None).hits.mean() == pytest.approx(0.5)
    assert whole.score(suite, None).hits.mean() == 1.0
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_vectors_cut_short_have_unit_length_and_none_of_zeros_becomes_nan() -> None:
    vectors = np.array([[3, 4, 12], [0, 0, 1]], np.float32)
    np.testing.assert_allclose(shortened(vectors, 2), [[0.6, 0.8], [0.0, 0.0]])
