"""Gate runs of a vision-language model on vLLM, the engine that serves it."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import GateError
from tests.integration.gate.vlm_cases import VlmGate, open_vlm_gate
from tests.support.tiny_vlm import tiny_vlm_adapter

pytestmark = [
    pytest.mark.integration,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def vlm_gate(taught_home: Path) -> Iterator[VlmGate]:
    with open_vlm_gate(taught_home, "vllm") as vlm_gate:
        yield vlm_gate


def test_a_candidate_that_learned_and_lost_nothing_passes(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.learner())
    assert verdict.outcome == "passed", verdict.reasons
    parity = next(check for check in verdict.checks if check.name == "parity")
    assert parity.ok and parity.value is not None and parity.value < 1e-3


def test_noise_in_every_part_of_the_model_is_rejected(vlm_gate: VlmGate) -> None:
    directory = vlm_gate.home / "noise-everywhere"
    name = tiny_vlm_adapter(vlm_gate.base, directory, seed=6, scale=3.0, parts=("text", "image", "connector"))
    vlm_gate.evaluator.load(name, directory)
    verdict = vlm_gate.gate(name)
    assert verdict.outcome == "rejected"
    assert {"colour", "presence"} & set(verdict.caught_by)
    assert next(check for check in verdict.checks if check.name == "parity").ok, "it is bad, and served as trained"


def test_an_adapter_that_changes_nothing_is_inconclusive(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.noise(0.0))
    assert verdict.outcome == "inconclusive" and verdict.caught_by == ("gain",)


def test_an_engine_that_is_killed_is_an_error_and_no_verdict(vlm_gate: VlmGate) -> None:
    """Must be the last test of the file: it kills the engine."""
    name = vlm_gate.noise(0.1)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(GateError, match="the VLM engine ended"):
        vlm_gate.gate(name)
