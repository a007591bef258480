from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from core.ledger import Ledger
from core.ledger.rows import GateOutcome
from updater.service.learning_state import LedgerMetrics


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


def judged(
    ledger: Ledger, number: int, outcome: GateOutcome, suites: dict[str, dict[str, Any]], **summary: Any
) -> None:
    update, adapter = f"update-{number}", f"clip-{number:012x}"
    ledger.begin_update(
        update, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    cost = {"gflops_planned": 10.0 * number, "gflops_spent": 8.0 * number}
    ledger.advance_update(update, "trained", adapter=adapter, cost=cost)
    ledger.record_verdict(update, adapter, outcome, "", {"suites": suites, **summary})
    ledger.advance_update(update, "done")


def suite(role: str, after: float, left: float | None) -> dict[str, Any]:
    return {"role": role, "base": 0.5, "before": 0.6, "after": after, "margin_left": left}


def test_the_last_verdict_and_cost_are_exported_by_an_updater_that_has_just_started(ledger: Ledger) -> None:
    judged(ledger, 1, "passed", {"fresh.facts": suite("gain", 0.9, None)})
    judged(ledger, 2, "rejected", {"emoji.facts": suite("retention", 0.4, -0.07)})
    exporter = LedgerMetrics(ledger)
    exporter.export(["clip"])
    assert [value(f"update_{which}_flops", family="clip") for which in ("planned", "spent")] == [20e9, 16e9]
    score = {"family": "clip", "suite": "emoji.facts", "role": "retention"}
    scores = [value("gate_suite_score_ratio", **score, model=m) for m in ("base", "incumbent", "candidate")]
    assert scores == [0.5, 0.6, 0.4]
    assert value("gate_margin_left_ratio", family="clip", suite="emoji.facts") == -0.07
    assert value("gate_suite_score_ratio", family="clip", suite="fresh.facts", role="gain", model="base") is None
    times = [
        value("gate_last_verdict_timestamp_seconds", family="clip", outcome=each) for each in ("rejected", "passed")
    ]
    assert times == [verdict.created_at.timestamp() for verdict in ledger.verdicts()]
    judged(ledger, 4, "passed", {"b.facts": suite("retention", 0.5, 0.02)})  # by another process
    exporter.export(["clip"])
    left = [value("gate_margin_left_ratio", family="clip", suite=f"{each}.facts") for each in ("emoji", "b")]
    assert left == [None, 0.02]


def test_the_shift_of_the_last_candidates_features_is_exported_and_nothing_is_made_up(ledger: Ledger) -> None:
    moved = {"from_incumbent": 0.01, "from_base": 0.03}
    judged(ledger, 5, "passed", {}, diagnostics={"shift": {"towers": {"image": moved, "text": moved}}})
    LedgerMetrics(ledger).export(["clip"])
    assert value("gate_feature_shift_ratio", family="clip", tower="image", model="base") == 0.03
    assert value("gate_feature_shift_ratio", family="clip", tower="text", model="incumbent") == 0.01
    judged(ledger, 6, "rejected", {}, diagnostics={"shift": None})
    LedgerMetrics(ledger).export(["clip", "vlm"])
    assert value("gate_feature_shift_ratio", family="clip", tower="image", model="base") is None
    assert value("gate_last_verdict_timestamp_seconds", family="vlm", outcome="passed") is None
