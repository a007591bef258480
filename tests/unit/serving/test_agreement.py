"""When two releases agree about an input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from serving.releases.shadow_traffic import FEWEST, NATS_PER_TOKEN, TEXTS, Neighbours, order, same_answer

DIM, REFERENCES = 32, 40


def unit(random: np.random.Generator, *shape: int) -> np.ndarray:
    made = random.standard_normal(shape).astype(np.float32)
    return made / np.linalg.norm(made, axis=-1, keepdims=True)


def turned(random: np.random.Generator) -> np.ndarray:
    """A rotation: another space, in which everything lies as before."""
    return np.linalg.qr(random.standard_normal((DIM, DIM)))[0].astype(np.float32)


def test_a_space_that_is_only_turned_agrees_wholly() -> None:
    random = np.random.default_rng(0)
    one, references, turn = unit(random, DIM), unit(random, REFERENCES, DIM), turned(random)
    assert order(one, list(references), one @ turn, list(references @ turn)) == pytest.approx(1.0)


def test_another_model_disagrees_about_nearly_everything() -> None:
    random = np.random.default_rng(1)
    neighbours = Neighbours()
    neighbours.fix(unit(random, len(TEXTS), DIM), unit(random, len(TEXTS), DIM))
    found = [neighbours.judge("image", unit(random, DIM), unit(random, DIM)) for _ in range(200)]
    assert sum(map(bool, found)) <= 4


@pytest.mark.parametrize("broken", [np.zeros(DIM), np.full(DIM, np.nan), np.full(DIM, np.inf)])
def test_a_vector_that_says_nothing_never_agrees(broken: np.ndarray) -> None:
    random = np.random.default_rng(2)
    references = list(unit(random, REFERENCES, DIM))
    with np.errstate(invalid="ignore"):
        assert order(broken.astype(np.float32), references, unit(random, DIM), references) == 0.0


def test_a_collapsed_model_never_agrees() -> None:
    random = np.random.default_rng(3)
    same = np.tile(unit(random, DIM), (REFERENCES, 1))
    assert order(same[0], list(same), unit(random, DIM), list(unit(random, REFERENCES, DIM))) < 0.5


def test_texts_are_ranked_against_images_once_there_are_enough() -> None:
    random = np.random.default_rng(4)
    neighbours = Neighbours()
    assert neighbours.judge("text", unit(random, DIM), unit(random, DIM)) is None  # nothing to rank against
    for _ in range(FEWEST):
        neighbours.judge("image", image := unit(random, DIM), image)
    text = unit(random, DIM)
    assert neighbours.judge("text", text, text) is True
    assert neighbours.judge("text", text, -text) is False


def test_the_same_words_agree_and_so_does_an_answer_that_both_find_likely() -> None:
    assert same_answer(" red", "red", -9.0, -9.0, 1)
    assert same_answer("red", "crimson", -0.2, -0.2 - NATS_PER_TOKEN, 1)
    assert same_answer("a red bus", "a bus", -1.0, -1.0 - 3 * NATS_PER_TOKEN, 3)
    assert not same_answer("red", "zzz", -0.2, -0.3 - NATS_PER_TOKEN, 1)
    assert not same_answer("red", "zzz", -0.2, -math.inf, 1)
    assert not same_answer("", "zzz", 0.0, math.nan, 0)
