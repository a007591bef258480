"""Across bases each model answers through an engine of its own base, also where the dimension differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import AdapterError
from core.settings.updates import Gate
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.gate.builders import TableImages, fresh_suite, sample_rows
from updater.gate.clip import AcrossBasesEvaluator, ClipEvaluator, base_alone
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.run import run_gate
from updater.gate.sample_suites import choose_memory, memory_suites


def test_each_model_is_asked_on_its_base(tmp_path: Path) -> None:
    old, new = tiny_base(tmp_path), tiny_base(tmp_path, "wide", seed=5, dim=48)
    incumbent = tiny_adapter(old, tmp_path / "incumbent", seed=1)
    candidate = tiny_adapter(new, tmp_path / "candidate", seed=2)
    evaluator = AcrossBasesEvaluator(ClipEngine(old, threads=1), ClipEngine(new, threads=1), candidate)
    with pytest.raises(AdapterError, match=r"belongs to the base 'tiny' .* this one is 'wide'"):
        evaluator.load(incumbent, tmp_path / "incumbent", candidate=True)
    evaluator.load(incumbent, tmp_path / "incumbent")
    evaluator.load(candidate, tmp_path / "candidate", candidate=True)
    rows = sample_rows(30)
    suite = fresh_suite(rows)
    plain = {base.name: ClipEvaluator(ClipEngine(base, threads=1)) for base in (old, new)}
    plain["tiny"].load(incumbent, tmp_path / "incumbent")
    plain["wide"].load(candidate, tmp_path / "candidate")
    for name, asked, base in (
        (candidate, candidate, "wide"), (None, None, "wide"), (incumbent, incumbent, "tiny"),
        (base_alone(old), None, "tiny"),
    ):  # fmt: skip
        ranks = evaluator.score(suite, name).ranks
        assert np.array_equal(ranks, plain[base].score(suite, asked).ranks)
    assert not np.array_equal(evaluator.score(suite, None).ranks, evaluator.score(suite, base_alone(old)).ranks)

    memory = memory_suites(rows, choose_memory(rows, "clip", 10), "clip", 10, TableImages(rows))
    verdict = run_gate(
        evaluator=evaluator, candidate=candidate, incumbent=incumbent, suites=memory, fresh=[suite],
        plan=AnalysisPlan.alone(0.05), settings=Gate(min_items=5),
    )  # fmt: skip
    assert (verdict.base, verdict.meta["base_digest"], verdict.cross_version) == ("wide", new.digest, None)
    assert verdict.diagnostics.warnings == ()
    assert {check.name: check.ok for check in verdict.checks}["parity"]
    (retained,) = [each for each in verdict.suites if each.role == "retention"]
    own = memory[0]
    assert retained.base == pytest.approx(plain["wide"].score(own, None).hits.mean())
    assert retained.before == pytest.approx(plain["tiny"].score(own, incumbent).hits.mean())
