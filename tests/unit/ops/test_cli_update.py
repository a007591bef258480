"""What an operator does about one update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.ledger import Ledger
from core.loading import load_settings
from ops.cli.main import app

runner = CliRunner()
GIVEN: dict[str, Any] = {
    "recipe": {"name": "default"}, "seed": 1, "store_version": 0, "data_from": {}, "data_to": {}, "incumbent": None,
}  # fmt: skip


def ratchet(home: Path, *words: str) -> Any:
    return runner.invoke(app, ["--set", f"home={home}", "trainer", *words])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    settings = load_settings(overrides={"home": tmp_path})
    made = Ledger.open(settings.ledger)
    made.begin_update("update-1", family="clip", **GIVEN)
    return made


def test_an_update_is_abandoned_with_a_reason_and_taken_up_again(tmp_path: Path, ledger: Ledger) -> None:
    ended = ratchet(tmp_path, "abandon", "update-1", "--reason", "broken pictures")
    assert ended.exit_code == 0, ended.output
    update = ledger.update("update-1")
    assert update.state == "failed" and str(update.error).endswith(": broken pictures")
    assert ratchet(tmp_path, "abandon", "update-1", "--reason", "again").exit_code == 1
    ledger.advance_update("update-1", cost={"attempts": 3})
    assert ratchet(tmp_path, "retry", "update-1").exit_code == 0
    update = ledger.update("update-1")
    assert (update.state, update.error, update.cost["attempts"]) == ("training", None, 0)
    assert [row.action for row in ledger.audit_rows(subject="update update-1")] == ["update.retry", "update.abandon"]


def test_an_update_that_another_one_followed_is_not_taken_up_again(tmp_path: Path, ledger: Ledger) -> None:
    ledger.advance_update("update-1", "failed", error="it broke off")
    ledger.begin_update("update-2", family="clip", **GIVEN)
    refused = ratchet(tmp_path, "retry", "update-1")
    assert refused.exit_code == 1 and "not the newest" in str(refused.exception)
    assert ledger.update("update-1").state == "failed"
    assert ratchet(tmp_path, "retry", "update-3").exit_code == 1
