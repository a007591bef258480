"""When a release is audited, what an audit finds, and what the ledger makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from core.ledger import Ledger, ReleaseAuditRow
from core.loading import load_settings
from core.settings import Settings
from tests.unit.updater.gate.builders import changed, outcomes, suite_over
from tests.unit.updater.gate.test_decision import hits
from updater.gate.statistics import Comparison
from updater.service.release_audit import DueAudit, compare_rows, due_audit, lost

BASE = cast(Any, SimpleNamespace(digest="b", family="clip"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(overrides={"home": tmp_path, "gate.audit_every": 3}, environ={})


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    made = Ledger.open(settings.ledger)
    yield made
    made.close()


def release(ledger: Ledger, adapter: str | None, share: float = 1.0) -> None:
    live = ledger.live()
    ledger.commit_release(
        live.number + 1 if live else 1, clip=adapter, vlm=None, actor="u", reason="r", proposal_id=None, share=share
    )  # fmt: skip


def audited(ledger: Ledger, due: DueAudit, passed: bool = True) -> ReleaseAuditRow:
    return ledger.record_release_audit(
        ReleaseAuditRow(
            family="clip", base="b", release=due.live.number, adapter=due.adapter,
            reference=due.last.adapter if due.last else None, reference_release=due.last.release if due.last else None,
            passed=passed, data_to={"samples:0": 7}, summary={"reasons": ["emoji: lost 9.0 points"]},
        )
    )  # fmt: skip


def test_an_audit_is_due_after_so_many_new_adapters_and_compares_with_the_last_that_passed(
    settings: Settings, ledger: Ledger
) -> None:
    def due(**how: bool) -> DueAudit | None:
        return due_audit(settings, ledger, BASE, "clip", **how)

    assert due(now=True) is None, "nothing was released"
    release(ledger, None)
    assert due(now=True) is None, "the base alone is nothing to audit"
    for adapter in ("clip-1", "clip-2", "clip-1", "clip-2"):
        release(ledger, adapter)
    release(ledger, "clip-3", share=0.1)
    assert due() is None, "releases of two adapters, and one that is on trial"
    by_hand = due(now=True)
    assert by_hand is not None and (by_hand.live.number, by_hand.adapter, by_hand.last) == (5, "clip-2", None)
    release(ledger, "clip-3")
    first = due()
    assert first is not None and (first.live.number, first.since) == (7, "since the first release")
    audited(ledger, first)
    assert due(now=True) is None and ledger.audited_data("clip") == {"samples:0": 7}
    for adapter in ("clip-4", "clip-5", "clip-6"):
        assert due() is None
        release(ledger, adapter)
    second = due()
    assert second is not None and second.last is not None and second.since == "since release 7"


def test_a_failed_audit_holds_updates_and_says_what_takes_it_back(settings: Settings, ledger: Ledger) -> None:
    for adapter in (None, "clip-1", "clip-2"):
        release(ledger, adapter)
    due = due_audit(settings, ledger, BASE, "clip", now=True)
    assert due is not None
    row = audited(ledger, due, passed=False)
    held = ledger.held()
    assert held is not None and held.reason == "the audit of release 3 failed: emoji: lost 9.0 points"
    assert audited(ledger, due).passed is False, "a release is audited once"
    failed = ledger.failed_audit("clip")
    assert failed is not None and failed.id == row.id
    assert "rollback --family clip --to 1`" in failed.advice and "resume" in failed.advice
    release(ledger, None)
    assert ledger.failed_audit("clip") is None, "it was taken back"
    assert ledger.held() is not None, "until an operator resumes"


def compared(n: int, before_lost: int, gained: int, margin: float) -> Comparison:
    before = hits(4 * n, 0.5)
    rows = np.arange(4 * n) % 4 == 0
    after = before.copy()
    after[rows] = changed(before[rows], before_lost, gained)
    after[~rows] = 0  # what is not sealed has no part in it
    suite = suite_over(before, "emoji", "retention", "classification")
    return compare_rows(suite, outcomes(before), outcomes(after), rows, margin, 0.05)


def test_an_audit_fails_by_a_loss_that_is_shown_to_be_beyond_its_margin_and_by_no_other() -> None:
    fine, small = compared(300, 9, 9, 0.05), compared(300, 16, 4, 0.05)
    large, few = compared(300, 40, 5, 0.05), compared(40, 4, 1, 0.05)
    beyond = compared(300, 24, 4, 0.05)
    assert small.p_worse < 0.01 and few.difference < -0.05 and beyond.difference < -0.05
    found = lost({"fine": fine, "small": small, "large": large, "few": few, "beyond": beyond}, 0.05)
    assert [name for name, _ in found] == ["large"], "a loss of 6.7 points may be one of 5"
    assert found[0][1].n == 300
