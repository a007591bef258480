"""Whole gate runs of a vision-language model on transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import GateError
from serving.engines.adapters import read_adapter, write_adapter
from tests.integration.gate.taught_vlm import question_table, unknown
from tests.integration.gate.vlm_cases import VlmGate, open_vlm_gate
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.unit.updater.gate.builders import fresh_suite, fresh_suites, sample_rows
from updater.gate.report import write_report
from updater.gate.run import open_evaluator
from updater.gate.vlm import VlmEvaluator

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def vlm_gate(taught_home: Path) -> Iterator[VlmGate]:
    with open_vlm_gate(taught_home, "transformers") as vlm_gate:
        yield vlm_gate


@pytest.fixture(autouse=True)
def room(vlm_gate: VlmGate) -> Iterator[None]:
    yield
    vlm_gate.clear()


def test_a_candidate_that_learned_and_lost_nothing_passes(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.learner())
    assert verdict.outcome == "passed", verdict.reasons
    assert {check.name for check in verdict.checks} == {
        "loads", "finite", "norm_drift", "parity", "latency", "size", "collapse", "yes_no",
    }  # fmt: skip
    suites = {suite.name: suite for suite in verdict.suites}
    assert suites["fresh.new"].after > 0.9 > 0.3 > suites["fresh.new"].before
    assert suites["colour"].chance == pytest.approx(0.25, abs=0.02)
    assert suites["presence"].chance == pytest.approx(0.5, abs=0.02)


def test_noise_is_rejected_with_the_questions_that_it_lost(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.noise(3.0))
    assert verdict.outcome == "rejected"
    assert "colour" in verdict.caught_by
    lost = next(suite for suite in verdict.suites if suite.name == "colour").worst
    assert lost and all(w.expected == w.answer_before != w.answer_after for w in lost)
    assert all(w.text == "which colour?" and w.thumbnail.startswith("data:image/jpeg;base64,") for w in lost)
    write_report(verdict, vlm_gate.home / "noise-report")
    page = (vlm_gate.home / "noise-report" / "report.html").read_text()
    assert f"right: {lost[0].expected}" in page and "which colour?" in page
    json.loads((vlm_gate.home / "noise-report" / "report.json").read_text(), parse_constant=pytest.fail)


def test_an_adapter_that_changes_nothing_is_inconclusive(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.noise(0.0))
    assert verdict.outcome == "inconclusive"
    assert verdict.caught_by == ("gain",)
    assert all(suite.difference == 0.0 for suite in verdict.suites)


def test_one_that_always_says_yes_is_caught_by_the_check(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.gate(vlm_gate.yes_sayer())
    assert verdict.outcome == "rejected"
    assert "yes_no" in verdict.caught_by
    share = verdict.diagnostics.yes["presence"]
    assert share.after == 1.0 and share.truth == pytest.approx(0.5, abs=0.2) and share.before < 0.8
    assert any("presence" in warning for warning in verdict.diagnostics.warnings)
    assert next(suite for suite in verdict.suites if suite.name == "colour").decision == "passed"


def test_the_incumbent_is_what_must_not_be_lost(vlm_gate: VlmGate) -> None:
    """The base never knew the new question: only the comparison with the incumbent shows a loss."""
    learner = vlm_gate.learner()
    verdict = vlm_gate.gate(vlm_gate.noise(0.0), incumbent=learner)
    fresh = next(suite for suite in verdict.suites if suite.name == "fresh.new")
    assert verdict.outcome == "rejected" and "fresh.new" in verdict.caught_by
    assert fresh.before > 0.9 and fresh.difference_base == 0.0


def test_answers_are_kept_on_disk_and_asked_for_once(vlm_gate: VlmGate) -> None:
    name = vlm_gate.noise(0.0)
    first = vlm_gate.gate(name)

    def ask_again() -> tuple[int, dict[str, float]]:
        vlm, cache = vlm_gate.evaluator.vlm, vlm_gate.evaluator.cache
        evaluator = VlmEvaluator(vlm, vlm_gate.settings.serve, cache=cache)
        suites = (*vlm_gate.suites, *vlm_gate.fresh)
        scores = {suite.name: float(evaluator.score(suite, None).hits.mean()) for suite in suites}
        for suite in suites:
            evaluator.score(suite, name)
        return evaluator.question_count, scores

    base = {suite.name: suite.base for suite in first.suites}
    assert ask_again() == (0, base)
    damaged = list((vlm_gate.home / "cache" / "gate").glob("*.npz"))
    for kept in damaged:
        kept.write_bytes(b"not a zip")
    asked, scores = ask_again()
    assert asked > 0 and scores == base, "what is damaged is asked again"
    assert any(kept.read_bytes() != b"not a zip" for kept in damaged), "written anew"
    assert ask_again() == (0, base)


def test_a_candidate_with_infinite_answers_is_rejected_as_not_finite(vlm_gate: VlmGate) -> None:
    """The file is finite, the forward pass is not."""
    tiny_vlm_adapter(vlm_gate.base, vlm_gate.home / "huge-source", seed=4)
    files = read_adapter(vlm_gate.home / "huge-source")
    tensors = {key: tensor * 1e15 if "lora_B" in key else tensor for key, tensor in files.tensors.items()}
    name = write_adapter(vlm_gate.home / "huge", tensors, files.config, vlm_gate.base)
    vlm_gate.evaluator.load(name, vlm_gate.home / "huge")
    verdict = vlm_gate.gate(name)
    assert verdict.outcome == "rejected"
    assert verdict.caught_by == ("finite",) and verdict.suites == ()


def test_a_suite_of_the_other_family_is_refused(vlm_gate: VlmGate) -> None:
    with pytest.raises(GateError, match="a VLM cannot be asked for retrieval"):
        vlm_gate.gate(vlm_gate.noise(0.0), fresh=[fresh_suite(sample_rows(4))])


def test_a_question_too_long_is_an_error_of_the_suite(vlm_gate: VlmGate) -> None:
    long = [replace(one, question="why? " * 400) for one in unknown(range(60))]
    with pytest.raises(GateError, match="a question cannot be asked"):
        vlm_gate.gate(vlm_gate.noise(0.0), fresh=fresh_suites(question_table(long), family="vlm"))


def test_an_engine_that_dies_is_an_error_and_no_verdict(tmp_path: Path, vlm_gate: VlmGate) -> None:
    with open_evaluator(vlm_gate.settings, vlm_gate.base) as evaluator:
        assert isinstance(evaluator, VlmEvaluator)
        name = tiny_vlm_adapter(vlm_gate.base, tmp_path / "a", seed=8, scale=0.1)
        evaluator.load(name, tmp_path / "a")
        evaluator.cache = tmp_path / "cache"
        evaluator.vlm.engine._worker.stop("killed by a test")  # type: ignore[attr-defined]
        with pytest.raises(GateError, match="killed by a test"):
            VlmGate(vlm_gate.settings, vlm_gate.base, evaluator).gate(name)
