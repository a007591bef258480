"""`ratchet gate audit` and `ratchet gate calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.ledger import Ledger
from core.settings import Settings
from serving.engines.calibration import Calibration, MatchCurve
from tests.support.command_line import ratchet
from tests.support.story import LOST, audit
from updater.gate import gate_command
from updater.service import release_audit


def test_an_audit_is_made_at_once_and_its_failure_is_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger.open(Settings(home=tmp_path).ledger)
    monkeypatch.setattr(release_audit, "family_base", lambda *_: SimpleNamespace(digest="b"))
    monkeypatch.setattr(
        release_audit, "audit_release",
        lambda *given: ledger.record_release_audit(audit(given[-1].live.number, given[-1].adapter)),
    )  # fmt: skip
    ledger.commit_release(1, clip=None, vlm=None, actor="u", reason="r", proposal_id=None)
    nothing = ratchet(tmp_path, "gate", "audit")
    assert (nothing.exit_code, nothing.output) == (0, "there is nothing to audit: no adapter of the CLIP is live\n")
    ledger.register_adapter("clip-a", "clip", "b", "i", "t", {})
    ledger.commit_release(2, clip="clip-a", vlm=None, actor="u", reason="r", proposal_id=None)
    made = ratchet(tmp_path, "gate", "audit")
    assert made.exit_code == 1 and "release 2, clip-a: failed" in made.output and LOST in made.output
    assert "`ratchet releases rollback --family clip --to 1`" in made.output
    assert ratchet(tmp_path, "gate", "audit").output == made.output, "it is not repeated"
    assert [row.release for row in ledger.release_audits("clip")] == [2]
    ledger.close()


def test_a_calibration_is_shown_by_kind_of_query_with_what_it_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger.open(Settings(home=tmp_path).ledger).close()
    near = MatchCurve((0.1, 0.3), (0.2, 0.9), 100, 1000, 100, 0.011, 0.004, 0.02)
    curves = {"text": near, "label": MatchCurve((0.1,), (0.2,), 60, 600, 60, 0.05, 0.03, 0.08)}
    monkeypatch.setattr(gate_command, "calibrate_command", lambda _: ("clip-a", Calibration(curves, (256, 128))))
    told = json.loads(ratchet(tmp_path, "gate", "calibrate", "--json").output)
    rows = told["calibration"]
    assert told["lengths"] == [256, 128]
    assert "can be cut to 256 or 128 numbers" in " ".join(ratchet(tmp_path, "gate", "calibrate").output.split())
    assert [row["queries"] for row in rows] == ["text", "label"]
    assert rows[0]["calibration error"] == "1.1% [0.4%, 2.0%]"
    assert [row["min_probability"].partition(":")[0] for row in rows] == ["allowed", "refused"]
