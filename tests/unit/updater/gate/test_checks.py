from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from serving.engines.lora import effective_weights
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_engine import score
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from updater.gate import checks as c
from updater.gate.verdict import Check

RNG = np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    out: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return out


VECTORS = unit(RNG.normal(size=(64, 32)))


def test_nan_and_vanishing_vectors_are_not_finite() -> None:
    assert c.check_finite(VECTORS, VECTORS).ok
    broken = VECTORS.copy()
    broken[3, 4] = np.nan
    assert c.check_finite(VECTORS, broken).detail.startswith("1 of 128")
    assert not c.check_finite(np.zeros_like(VECTORS), VECTORS).ok


def test_collapse_to_a_point_and_to_a_line_are_caught() -> None:
    nearby = unit(VECTORS * 0.9 + RNG.normal(size=VECTORS.shape) * 0.05)
    point = unit(np.ones((64, 32)) + 1e-3 * VECTORS)
    line = unit(RNG.normal(size=(64, 1)) * np.ones((1, 32)) + 0.05 * VECTORS)
    assert c.check_collapse("image", VECTORS, nearby).ok
    assert not c.check_collapse("image", VECTORS, point).ok
    assert not c.check_collapse("image", VECTORS, line).ok
    directions = np.repeat(np.eye(4, 16), 50, axis=0) * np.tile([1.0, -1.0], 100)[:, None]
    assert c.effective_rank(directions.astype(np.float32)) == pytest.approx(4)
    assert c.effective_rank(np.ones((10, 5), np.float32)) == 1.0
    assert c.mean_cosine(VECTORS) == pytest.approx((VECTORS @ VECTORS.T)[~np.eye(64, dtype=bool)].mean(), abs=1e-6)


def test_drift_is_the_norm_of_the_change_over_the_norm_of_the_weights() -> None:
    before = {"a": torch.full((2, 2), 2.0), "b": torch.ones(3), "n": torch.tensor(3)}
    after = {"a": torch.full((2, 2), 2.2), "b": before["b"], "n": before["n"]}
    check = c.check_drift(before, after)
    assert check.ok and check.value == pytest.approx(0.1)
    assert "the 1 changed weights" in check.detail
    assert not c.check_drift(before, {**after, "a": torch.full((2, 2), -3.0)}).ok
    assert not c.check_drift(before, {**after, "a": torch.full((2, 2), float("nan"))}).ok
    assert c.check_drift(before, before).ok


def test_parity_catches_a_trainer_that_does_not_train_what_is_served() -> None:
    served = images, words = VECTORS[:4], VECTORS[4:8]
    inputs = np.zeros((4, 8, 8, 3), np.uint8), ["a", "b", "c", "d"]
    for trained in ((images, VECTORS[8:12]), (VECTORS[:3], words), (np.full_like(images, np.nan), words)):
        assert not c.check_parity(Mock(return_value=trained), *inputs, served).ok
    assert c.check_parity(Mock(return_value=served), *inputs, served).ok
    crash = Mock(side_effect=RuntimeError("no such layer"))
    assert "no such layer" in c.check_parity(crash, *inputs, served).detail


def test_size_is_bounded() -> None:
    sizes = ((8, 2_000_000), (None, None), (4096, 1000), (8, 10**9))
    assert [c.check_size(*size).ok for size in sizes] == [True, True, False, False]


COLOURS, NAMES = ["red", "green", "blue", "white", "black"] * 10, [f"thing {i}" for i in range(50)]
RED, BABBLE = ["red"] * 50, [f"x{i}" for i in range(50)]


@pytest.mark.parametrize(
    ("references", "base", "candidate", "ok"),
    [
        pytest.param(COLOURS, COLOURS, COLOURS, True, id="the same"),
        pytest.param(COLOURS, COLOURS, ["Red."] * 50, False, id="one answer"),
        pytest.param(NAMES, NAMES, ["a", "b", "c"] * 16 + ["a", "b"], False, id="few answers"),
        pytest.param(NAMES, NAMES, NAMES[:30] + ["thing 1"] * 20, True, id="fewer"),
        pytest.param(COLOURS, BABBLE, COLOURS, True, id="less than a base that babbles"),
        pytest.param(COLOURS, BABBLE, RED, False, id="one, after babble"),
        pytest.param(COLOURS, RED, RED, True, id="as base"),
    ],
)
def test_few_different_answers_are_a_collapse_unless_as_few_are_right_or_the_bases(
    references: list[str], base: list[str], candidate: list[str], ok: bool
) -> None:
    check = c.check_sameness(references, base, candidate)
    assert check.ok is ok
    assert ok or candidate[0] not in ("red", "Red.") or "'red', is 100% of them" in check.detail


@pytest.mark.parametrize("share", [0.5, 0.8, 0.2])
@pytest.mark.parametrize(("word", "missing"), [("yes", "no"), ("no", "yes")])
def test_always_yes_and_always_no_are_caught_whatever_the_mixture(word: str, missing: str, share: float) -> None:
    right = ["yes"] * int(100 * share) + ["no"] * int(100 * (1 - share))
    assert c.check_polarity(right, right, right).ok
    check = c.check_polarity(right, right, [word] * len(right))
    assert (check.ok, check.name) == (False, "yes_no") and repr(missing) in check.detail


def test_neither_yes_nor_no_is_caught_and_a_candidate_may_lean_and_stay_as_its_base_is() -> None:
    right = ["yes", "no"] * 25
    assert not c.check_polarity(right, right, ["a dog"] * 50).ok
    assert c.check_polarity(right, right, ["yes"] * 40 + ["no"] * 10).ok
    assert c.check_polarity(right, ["yes"] * 50, ["yes"] * 50).ok


def test_parity_compares_the_engine_with_peft(tmp_path: Path) -> None:
    base = tiny_vlm_base(tmp_path)
    tiny_vlm_adapter(base, tmp_path / "a", seed=1, scale=0.5, parts=("text", "image", "connector"))
    tiny_vlm_adapter(base, tmp_path / "large", seed=1, scale=30.0)
    assert [c.check_vlm_drift(base.build_model(), tmp_path / name).ok for name in ("a", "large")] == [True, False]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    asks, answers = [question(image, "which colour?") for image in pixels], ["red", "blue", "a round apple"]
    merged, plain = base.build_model(), base.build_model()
    for name, weight in effective_weights(tmp_path / "a", merged).items():
        merged.get_parameter(name).data.copy_(weight)
    said = [
        [score(model, base.processor(), ask, [text])[0] for ask, text in zip(asks, answers, strict=True)]
        for model in (plain, merged)
    ]

    def parity(*served: list[float]) -> Check:
        return c.check_vlm_parity(base, base.build_model(), tmp_path / "a", asks, answers, served)

    same = parity(*said)
    assert same.ok and same.value is not None and same.value < 1e-4
    assert not parity(said[0], said[0]).ok, "an engine that leaves the adapter out"
    assert not parity(said[0], [float("nan")] * 3).ok
    blurred = [[value + 0.01 * max(1.0, -value) for value in values] for values in said]
    assert parity(*blurred).ok, "half precision blurs the base as well"
    assert not parity(said[0], blurred[1]).ok


def latency(ask: Callable[[str | None], None], **how: Any) -> Check:
    return c.check_latency(ask, "x", "a batch takes", ratio=4.0, grace=0.05, rounds=2, **how)


@pytest.mark.parametrize(("slower", "ok"), [(1.0, True), (3.5, True), (5.0, False)])
def test_latency_compares_the_same_work_and_fails_a_slow_candidate(slower: float, ok: bool) -> None:
    now = 0.0

    def ask(adapter: str | None) -> None:
        nonlocal now
        now += 0.1 * (slower if adapter else 1.0)

    check = latency(ask, clock=lambda: now)
    assert check.ok is ok and check.value == pytest.approx(slower)
    assert check.detail.startswith(f"a batch takes {100 * slower:.1f} ms")


def test_a_hiccup_of_the_machine_and_the_time_that_others_have_are_not_held_against_a_candidate() -> None:
    now, turns = 0.0, 0

    def ask(adapter: str | None) -> None:
        nonlocal now, turns
        turns += adapter is not None
        now += 2.0 if adapter and turns < 6 else 0.1

    assert latency(ask, clock=lambda: now).ok and turns >= 6
    assert latency(lambda adapter: time.sleep(0.1 if adapter else 0.0)).ok, "it did not compute meanwhile"
