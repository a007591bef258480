"""A ledger with a story for the console: a rejected update, a released one, and their reports."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.artifacts import Artifacts
from core.ledger import Ledger, ReleaseAuditRow
from core.settings import Settings
from core.settings.serving import Rollout
from serving.releases.guard import ComparisonCounts, Observations, RequestCounts, look
from tests.unit.updater.gate.builders import changed, scores
from updater.gate.decision import conclude, decide
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.report import write_report
from updater.gate.verdict import Check, Diagnostics, FeatureShift, Regression, TowerShift, Verdict

EVIL = '<script>document.title = "stolen"</script><img src=x onerror="document.title=\'stolen\'">'
"""A caption that attempts script injection."""
ITEMS = 400
LOST = "emoji: lost 6.0 points against the base (-6.0 [-9.0, -3.0]), 5.0 points allowed, since release 1"
SHIFT = FeatureShift({"image": TowerShift(128, 0.01, 0.03, 31.0, 30.0)}, 0.8, 0.79)


class Story(NamedTuple):
    rejected: str
    passed: str
    adapter: str


def verdict(candidate: str, lost: int, won: int) -> Verdict:
    before = (np.random.default_rng(0).random((ITEMS, 2)) < 0.6).astype(float)
    worst = (Regression("a1", EVIL, "image to text", 0, 40, "a dog", EVIL, ""),)
    kept = scores("emoji_retrieval", before, changed(before, lost, 4))
    gained = scores("fresh.fluent3d", before, changed(before, 6, won), role="gain")
    entries = [replace(kept, worst=worst), gained]
    findings = decide(entries, level=0.03, loss_level=0.05, margin=0.05, mean_margin=0.015, min_items=50)
    checks = (Check("finite", True, "128 vectors are finite", 0.0, 0.01),)
    outcome, reasons = conclude(findings, checks)
    return Verdict(
        outcome=outcome, reasons=reasons, candidate=candidate, incumbent=None, base="tiny", suites=findings.results,
        gain=findings.gain, mean=findings.mean, checks=checks, alpha=0.05,
        look=AnalysisPlan(0.03, 0.05, 300).look(300), candidates=0, fresh=300, seconds=12.5,
        created_at="2026-01-01T00:00:00+00:00",
        cost={"gflops_planned": 6000.0, "gflops_spent": 5801.5, "seconds": 41.0}, meta={"recipe": EVIL},
        diagnostics=Diagnostics(shift=SHIFT, warnings=(f"something to look at {EVIL}",)),
    )  # fmt: skip


def tell(settings: Settings, folder: Path, adapter: str = "clip-0123456789ab") -> Story:
    """Write the story into the ledger and the artifacts of some settings; no server releases any of it."""
    ledger, artifacts = Ledger.open(settings.ledger), Artifacts(settings.artifacts)
    rejected = _update(ledger, artifacts, folder, "update-naive", "naive", "clip-ba9876543210", lost=90, won=60)
    passed = _update(ledger, artifacts, folder, "update-default", "default", adapter, lost=4, won=80)
    ledger.close()
    return Story(rejected, passed, adapter)


def seen(number: int, incumbent: int, agreed: int = 38) -> dict[str, Any]:
    """The guard's report of a watched release: the real statistics, on made-up counts of 40 inputs."""
    requests = {number: RequestCounts(120, 0), incumbent: RequestCounts(900, 1)}
    compared = ComparisonCounts(inputs=40, agreed=agreed, timed=40, slower=9, tried=40)
    evidence = look(Rollout(), Observations(number, requests, {"clip": compared}), incumbent, number=11)
    return {
        "requests": {str(release): asdict(answered) for release, answered in requests.items()},
        "compared": {"clip": asdict(compared)},
        "guardrails": [one.detail() for one in evidence],
    }


def audit(release: int, adapter: str, passed: bool = False) -> ReleaseAuditRow:
    """An audit of a CLIP adapter against the base and the adapter of release 1."""
    against: dict[str, Any] = {words: {} for words in ("the base", "release 1")}
    return ReleaseAuditRow(
        family="clip", base="b", release=release, adapter=adapter, reference=None, reference_release=1, passed=passed,
        data_to={}, summary={"reasons": ["nothing is lost" if passed else LOST], "references": against},
    )  # fmt: skip


def withdraw(ledger: Ledger, number: int, incumbent: int, adapter: str) -> str:
    """Write what the guard does when a release agrees with its predecessor on 4 of 40 inputs. Returns the reason."""
    reason = f"agreement (clip) of release {number} is out of bounds: 4 of 40 inputs agree (10%), at least 70% must"
    detail = {**seen(number, incumbent, agreed=4), "back_to": incumbent, "share": 1.0}
    ledger.withdraw([adapter], actor="guard", subject=f"release {number}", reason=reason, evidence=detail)
    return reason


def _update(
    ledger: Ledger, artifacts: Artifacts, folder: Path, name: str, recipe: str, adapter: str, lost: int, won: int
) -> str:
    found = verdict(adapter, lost, won)
    made: dict[str, Any] = {"gflops_planned": 6000.0, "gflops_spent": 5801.5, "gate_gflops": 320.0, "seconds": 41.0}
    ledger.begin_update(
        name, family="clip", recipe={"name": recipe}, seed=7, store_version=3, data_from={"samples:0": 0},
        data_to={"samples:0": 812}, incumbent=None,
    )  # fmt: skip
    write_report(found, folder / name)
    for file in (folder / name).iterdir():
        artifacts.write_bytes(f"reports/{name}/{file.name}", file.read_bytes())
    ledger.advance_update(name, "trained", adapter=adapter, cost=made)
    ledger.record_verdict(name, adapter, found.outcome, f"reports/{name}", found.summary())
    ledger.advance_update(name, "done")
    return name
