"""Engineering checks: each passes what is healthy and catches the one thing it is for."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_adapter, tiny_base
from updater.gate.checks import (
    check_collapse,
    check_drift,
    check_finite,
    check_latency,
    check_parity,
    check_size,
    effective_rank,
    mean_cosine,
)

RNG = np.random.default_rng(0)


def unit(vectors: np.ndarray) -> np.ndarray:
    out: np.ndarray = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return out


VECTORS = unit(RNG.normal(size=(64, 32)))


def test_nan_and_vanishing_vectors_are_not_finite() -> None:
    assert check_finite(VECTORS, VECTORS).ok
    broken = VECTORS.copy()
    broken[3, 4] = np.nan
    assert check_finite(VECTORS, broken).detail.startswith("1 of 128")
    assert not check_finite(np.zeros_like(VECTORS), VECTORS).ok


def test_collapse_to_a_point_and_to_a_line_are_caught() -> None:
    nearby = unit(VECTORS * 0.9 + RNG.normal(size=VECTORS.shape) * 0.05)
    point = unit(np.ones((64, 32)) + 1e-3 * VECTORS)
    line = unit(RNG.normal(size=(64, 1)) * np.ones((1, 32)) + 0.05 * VECTORS)
    assert check_collapse("image", VECTORS, nearby).ok
    assert not check_collapse("image", VECTORS, point).ok
    assert not check_collapse("image", VECTORS, line).ok


def test_effective_rank_counts_directions() -> None:
    directions = np.repeat(np.eye(4, 16), 50, axis=0)
    signs = np.tile([1.0, -1.0], 100)[:, None]
    assert abs(effective_rank((directions * signs).astype(np.float32)) - 4) < 1e-6
    assert effective_rank(np.ones((10, 5), np.float32)) == 1.0


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    cosines = (VECTORS @ VECTORS.T)[~np.eye(64, dtype=bool)]
    assert abs(mean_cosine(VECTORS) - float(cosines.mean())) < 1e-6


def test_drift_is_the_norm_of_the_change_over_the_norm_of_the_weights() -> None:
    before = {"a": torch.full((2, 2), 2.0), "b": torch.ones(3), "n": torch.tensor(3)}
    after = {"a": torch.full((2, 2), 2.2), "b": before["b"], "n": before["n"]}
    check = check_drift(before, after)
    assert check.ok and check.value is not None and abs(check.value - 0.1) < 1e-6
    assert "the 1 changed weights" in check.detail
    assert not check_drift(before, {**after, "a": torch.full((2, 2), -3.0)}).ok
    assert not check_drift(before, {**after, "a": torch.full((2, 2), float("nan"))}).ok
    assert check_drift(before, before).ok


def test_parity_catches_a_trainer_that_does_not_train_what_is_served() -> None:
    served = (VECTORS[:4], VECTORS[4:8])
    pixels, texts = np.zeros((4, 8, 8, 3), np.uint8), ["a", "b", "c", "d"]
    assert check_parity(lambda p, t: served, pixels, texts, served).ok
    assert not check_parity(lambda p, t: (VECTORS[:4], VECTORS[8:12]), pixels, texts, served).ok
    assert not check_parity(lambda p, t: (VECTORS[:3], VECTORS[4:8]), pixels, texts, served).ok
    nan = np.full_like(served[0], np.nan)
    assert not check_parity(lambda p, t: (nan, served[1]), pixels, texts, served).ok

    def crash(pixels: np.ndarray, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        raise RuntimeError("no such layer")

    assert "no such layer" in check_parity(crash, pixels, texts, served).detail


def test_latency_compares_both_models_on_the_same_inputs(tmp_path: Path) -> None:
    engine = ClipEngine(tiny_base(tmp_path), threads=1)
    name = tiny_adapter(engine.base, tmp_path / "a", seed=1)
    engine.load(name, tmp_path / "a")
    check = check_latency(engine, name, np.zeros((4, 32, 32, 3), np.uint8), ["a", "b"], rounds=2)
    assert check.name == "latency" and check.value is not None and 0 < check.value < float("inf")
    assert "4 images and 2 texts" in check.detail


def compute(seconds: float) -> None:
    """Take so much of a processor."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_latency_does_not_count_the_time_that_others_have_the_processor() -> None:
    class Interrupted:
        """As fast as the base, on a machine that has other things to do."""

        def encode_images(self, pixels: np.ndarray, adapter: str | None) -> None:
            compute(0.002)
            time.sleep(0.02 if adapter else 0.0)

        def encode_texts(self, texts: list[str], adapter: str | None) -> None: ...

    check = check_latency(Interrupted(), "x", np.zeros((1, 2, 2, 3), np.uint8), ["a"], rounds=2)  # type: ignore[arg-type]
    assert check.ok


def test_latency_fails_a_slow_candidate() -> None:
    class Slow:
        def encode_images(self, pixels: np.ndarray, adapter: str | None) -> None:
            compute(0.02 if adapter else 0.002)

        def encode_texts(self, texts: list[str], adapter: str | None) -> None: ...

    check = check_latency(Slow(), "x", np.zeros((1, 2, 2, 3), np.uint8), ["a"], rounds=2)  # type: ignore[arg-type]
    assert not check.ok


def test_a_hiccup_of_the_machine_is_not_held_against_a_candidate() -> None:
    class Hiccups:
        """Slow for the candidate's first turns, then as fast as the base."""

        turns = 0

        def encode_images(self, pixels: np.ndarray, adapter: str | None) -> None:
            self.turns += adapter is not None
            compute(0.03 if adapter and self.turns < 6 else 0.002)

        def encode_texts(self, texts: list[str], adapter: str | None) -> None: ...

    engine = Hiccups()
    check = check_latency(engine, "x", np.zeros((1, 2, 2, 3), np.uint8), ["a"], rounds=2)  # type: ignore[arg-type]
    assert check.ok and engine.turns > 5


def test_size_is_bounded() -> None:
    assert check_size(8, 2_000_000).ok
    assert check_size(None, None).ok
    assert not check_size(4096, 1000).ok
    assert not check_size(8, 10**9).ok
