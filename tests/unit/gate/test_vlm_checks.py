"""Checks of what a vision-language candidate says: each passes what is healthy and catches the one thing it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.engines.lora import effective_weights
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_worker import score
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from updater.gate.verdict import Check
from updater.gate.vlm_checks import (
    check_collapse,
    check_delta,
    check_latency,
    check_parity,
    check_polarity,
)

COLOURS = ["red", "green", "blue", "white", "black"] * 10


def test_the_same_answer_to_everything_is_a_collapse() -> None:
    assert check_collapse(COLOURS, COLOURS, COLOURS).ok
    caught = check_collapse(COLOURS, COLOURS, ["Red."] * 50)
    assert not caught.ok and "'red', is 100% of them" in caught.detail


def test_a_few_answers_to_everything_are_a_collapse() -> None:
    names = [f"thing {i}" for i in range(50)]
    assert not check_collapse(names, names, ["a", "b", "c"] * 16 + ["a", "b"]).ok
    assert check_collapse(names, names, names[:30] + ["thing 1"] * 20).ok


def test_a_base_that_babbles_does_not_ask_for_babble() -> None:
    babble = [f"x{i}" for i in range(50)]
    assert check_collapse(COLOURS, babble, COLOURS).ok, "fewer answers than the base, as many as are right"
    assert not check_collapse(COLOURS, babble, ["red"] * 50).ok


def test_a_base_that_always_says_one_thing_may_be_followed() -> None:
    assert check_collapse(COLOURS, ["red"] * 50, ["red"] * 50).ok


@pytest.mark.parametrize("share", [0.5, 0.8, 0.2])
@pytest.mark.parametrize("word", ["yes", "no"])
def test_always_yes_and_always_no_are_caught_whatever_the_mixture(word: str, share: float) -> None:
    right = ["yes"] * int(100 * share) + ["no"] * int(100 * (1 - share))
    assert check_polarity(right, right, right).ok
    check = check_polarity(right, right, [word] * len(right))
    assert not check.ok and check.name == "yes_no"
    assert repr("no" if word == "yes" else "yes") in check.detail


def test_neither_yes_nor_no_is_caught_too() -> None:
    right = ["yes", "no"] * 25
    assert not check_polarity(right, right, ["a dog"] * 50).ok


def test_a_candidate_may_lean_and_may_stay_as_its_base_is() -> None:
    right = ["yes", "no"] * 25
    assert check_polarity(right, right, ["yes"] * 40 + ["no"] * 10).ok
    assert check_polarity(right, ["yes"] * 50, ["yes"] * 50).ok


def test_drift_is_measured_on_the_weights_that_the_adapter_changes(tmp_path: Path) -> None:
    base = tiny_vlm_base(tmp_path)
    tiny_vlm_adapter(base, tmp_path / "small", seed=1, scale=0.1)
    tiny_vlm_adapter(base, tmp_path / "large", seed=1, scale=30.0)
    small, large = (check_delta(base.build_model(), tmp_path / name) for name in ("small", "large"))
    assert small.ok and small.value is not None and 0.0 < small.value < 0.3
    assert not large.ok and large.name == "norm_drift"


def test_parity_compares_the_engine_with_peft(tmp_path: Path) -> None:
    base = tiny_vlm_base(tmp_path)
    tiny_vlm_adapter(base, tmp_path / "a", seed=1, scale=0.5, parts=("text", "image", "connector"))
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
        return check_parity(base, base.build_model(), tmp_path / "a", asks, answers, served)

    same = parity(*said)
    assert same.ok and same.value is not None and same.value < 1e-4
    assert not parity(said[0], said[0]).ok, "an engine that leaves the adapter out"
    assert not parity(said[0], [float("nan")] * 3).ok
    blurred = [[value + 0.01 * max(1.0, -value) for value in values] for values in said]
    assert parity(*blurred).ok, "half precision blurs the base as well"
    assert not parity(said[0], blurred[1]).ok


@pytest.mark.parametrize(("slower", "ok"), [(1.0, True), (3.5, True), (5.0, False)])
def test_latency_compares_the_same_work(slower: float, ok: bool) -> None:
    now = 0.0

    def ask(adapter: str | None) -> None:
        nonlocal now
        now += 0.1 * (slower if adapter else 1.0)

    check = check_latency(ask, "x", rounds=2, clock=lambda: now)
    assert check.ok is ok and check.value == pytest.approx(slower)


def test_a_hiccup_of_the_machine_is_not_held_against_a_candidate() -> None:
    now, turns = 0.0, 0

    def ask(adapter: str | None) -> None:
        nonlocal now, turns
        turns += adapter is not None
        now += 2.0 if adapter and turns < 6 else 0.1

    assert check_latency(ask, "x", rounds=2, clock=lambda: now).ok and turns >= 6
