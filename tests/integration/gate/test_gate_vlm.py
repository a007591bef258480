"""Whole gate runs of a vision-language model, on transformers and on vLLM, which serves it."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import GateError
from serving.engines.adapters import read_adapter, write_adapter
from tests.integration.gate.taught_vlm import VlmGate, gain_suites, open_vlm_gate, rerank_suite, unknown
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.unit.updater.gate.builders import fresh_suite, sample_rows
from updater.gate.report import write_report
from updater.gate.vlm import VlmEvaluator

NO_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the models for both engines: training them takes longer than a gate run."""
    return tmp_path_factory.mktemp("taught")


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=[pytest.mark.long, NO_VLLM])])
def opened(request: pytest.FixtureRequest, home: Path) -> Iterator[VlmGate]:
    with open_vlm_gate(home, request.param) as vlm_gate:
        yield vlm_gate


@pytest.fixture
def vlm_gate(opened: VlmGate) -> Iterator[VlmGate]:
    yield opened
    if opened.evaluator.vlm.engine.last_error() == "":
        opened.clear()


def test_a_candidate_that_learned_and_lost_nothing_passes(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.judge(vlm_gate.learner())
    assert verdict.outcome == "passed", verdict.reasons
    checks = {check.name: check for check in verdict.checks}
    assert checks.keys() == {
        "loads", "finite", "norm_drift", "parity", "latency", "size", "collapse", "yes_no",
    }  # fmt: skip
    assert checks["parity"].ok and (checks["parity"].value or 0) < 1e-3
    suites = {suite.name: suite for suite in verdict.suites}
    assert suites["fresh.new"].after > 0.9 > 0.3 > suites["fresh.new"].before
    assert suites["colour"].chance == pytest.approx(0.25, abs=0.02)
    assert suites["presence"].chance == pytest.approx(0.5, abs=0.02)


def test_the_incumbent_is_what_must_not_be_lost(vlm_gate: VlmGate) -> None:
    """The base never knew the new question: only the comparison with the incumbent shows a loss."""
    learner = vlm_gate.learner()
    verdict = vlm_gate.judge(vlm_gate.noise(0.0), incumbent=learner)
    fresh = next(suite for suite in verdict.suites if suite.name == "fresh.new")
    assert verdict.outcome == "rejected" and "fresh.new" in verdict.caught_by
    assert fresh.before > 0.9 and fresh.difference_base == 0.0


@pytest.mark.parametrize("parts", [("text",), pytest.param(("text", "image", "connector"), marks=pytest.mark.long)])
def test_noise_is_rejected_with_the_questions_that_it_lost(vlm_gate: VlmGate, parts: tuple[str, ...]) -> None:
    verdict = vlm_gate.judge(vlm_gate.noise(3.0, parts))
    assert verdict.outcome == "rejected" and {"colour", "presence"} & set(verdict.caught_by)
    assert next(check for check in verdict.checks if check.name == "parity").ok, "it is bad, and served as trained"
    lost = next(suite for suite in verdict.suites if suite.name == "colour").worst
    assert lost and all(w.expected == w.answer_before != w.answer_after for w in lost)
    assert all(w.text == "which colour?" and w.thumbnail.startswith("data:image/jpeg;base64,") for w in lost)
    report = vlm_gate.home / f"{vlm_gate.evaluator.kind}-{len(parts)}"
    write_report(verdict, report)
    assert f"right: {lost[0].expected}" in (report / "report.html").read_text()
    json.loads((report / "report.json").read_text(), parse_constant=pytest.fail)


def test_one_that_always_says_yes_is_caught_by_the_check(vlm_gate: VlmGate) -> None:
    verdict = vlm_gate.judge(vlm_gate.yes_sayer())
    assert verdict.outcome == "rejected" and "yes_no" in verdict.caught_by
    share = verdict.diagnostics.yes["presence"]
    assert share.after == 1.0 and share.truth == pytest.approx(0.5, abs=0.2) and share.before < 0.8
    assert any("presence" in warning for warning in verdict.diagnostics.warnings)
    assert next(suite for suite in verdict.suites if suite.name == "colour").decision == "passed"


def test_one_that_changes_nothing_is_inconclusive_and_answers_are_asked_for_once(vlm_gate: VlmGate) -> None:
    name = vlm_gate.noise(0.0)
    verdict = vlm_gate.judge(name)
    assert (verdict.outcome, verdict.caught_by) == ("inconclusive", ("gain",))
    assert all(suite.difference == 0.0 for suite in verdict.suites)
    base = next(suite for suite in verdict.suites if suite.name == "fresh.new").base
    (fresh,) = gain_suites(unknown(range(2000, 2120)))

    def ask_again() -> tuple[int, float]:
        vlm, cache = vlm_gate.evaluator.vlm, vlm_gate.evaluator.cache
        evaluator = VlmEvaluator(vlm, vlm_gate.settings.serve, vlm_gate.evaluator.clip, cache=cache)
        scores = [float(evaluator.score(fresh, adapter).hits.mean()) for adapter in (None, name)]
        return evaluator.question_count, scores[0]

    assert ask_again() == (0, base)
    damaged = list((vlm_gate.home / "cache" / "gate").glob("*.npz"))
    for kept in damaged:
        kept.write_bytes(b"not a zip")
    asked, score = ask_again()
    assert asked > 0 and score == base, "what is damaged is asked again"
    assert any(kept.read_bytes() != b"not a zip" for kept in damaged), "written anew"
    assert ask_again() == (0, base)


def test_an_order_of_the_hits_of_clip_that_gets_worse_is_a_loss(vlm_gate: VlmGate) -> None:
    suite, reranker = rerank_suite(vlm_gate.home), vlm_gate.reranker()
    evaluator = vlm_gate.evaluator
    base, taught = (evaluator.score(suite, name).hits.mean() for name in (None, reranker))
    assert 1.0 >= taught > evaluator.chance(suite) + 0.2 and taught > base + 0.2
    asked = evaluator.question_count
    assert evaluator.score(suite, reranker).hits.mean() == taught and evaluator.question_count == asked, "cached"
    verdict = vlm_gate.judge(vlm_gate.noise(0.0), incumbent=reranker, fresh=[suite])
    shown = next(each for each in verdict.suites if each.name == "shown")
    assert (shown.metric, shown.n, shown.units) == ("ndcg@10", 8, 4)
    assert (shown.before, shown.after) == (pytest.approx(taught), pytest.approx(base))
    assert shown.reason == "only 4 captions (8 items); at least 50 are asked for"
    assert {check.name: check.ok for check in verdict.checks}["yes_no"], "its questions are none of the checks'"
    assert "shown" not in verdict.diagnostics.yes
    lost = shown.worst[0]
    assert lost.expected == lost.text in {"red", "green", "blue", "white"}
    assert lost.answer_before.startswith("NDCG@10 ") and lost.answer_before > lost.answer_after
    write_report(verdict, vlm_gate.home / "shown-report")
    page = (vlm_gate.home / "shown-report" / "report.html").read_text()
    assert f"{lost.answer_before} → {lost.answer_after}" in page


def test_a_candidate_with_infinite_answers_is_rejected_as_not_finite(vlm_gate: VlmGate) -> None:
    """The file is finite, the forward pass is not."""
    if vlm_gate.evaluator.kind == "vllm":
        pytest.skip("vLLM's engine refuses it when it is loaded: tests/integration/engines")
    tiny_vlm_adapter(vlm_gate.base, vlm_gate.home / "huge-source", seed=4)
    files = read_adapter(vlm_gate.home / "huge-source")
    tensors = {key: tensor * 1e15 if "lora_B" in key else tensor for key, tensor in files.tensors.items()}
    verdict = vlm_gate.judge(
        vlm_gate.loaded(write_adapter(vlm_gate.home / "huge", tensors, files.config, vlm_gate.base), "huge")
    )
    assert (verdict.outcome, verdict.caught_by, verdict.suites) == ("rejected", ("finite",), ())


def test_what_a_vlm_cannot_be_asked_is_an_error_of_the_suite(vlm_gate: VlmGate) -> None:
    name = vlm_gate.noise(0.0)
    with pytest.raises(GateError, match="a VLM cannot be asked for retrieval"):
        vlm_gate.judge(name, fresh=[fresh_suite(sample_rows(4))])
    long = [replace(one, question="why? " * 400) for one in unknown(range(60))]
    with pytest.raises(GateError, match="a question cannot be asked"):
        vlm_gate.judge(name, fresh=gain_suites(long))


def test_an_engine_that_dies_is_an_error_and_no_verdict(vlm_gate: VlmGate) -> None:
    """Must be the last test of the file: it kills the engine."""
    name = vlm_gate.noise(0.1)
    engine = vlm_gate.evaluator.vlm.engine
    if vlm_gate.evaluator.kind == "transformers":
        engine._worker.stop("killed by a test")  # type: ignore[attr-defined]
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(GateError, match="the VLM engine ended"):
        vlm_gate.judge(name)
