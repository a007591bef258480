"""A rollback in the ledger alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from ops.cli.main import app
from serving.releases.rollback import roll_back_offline


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for number, (clip, vlm) in enumerate([(None, None), ("a", "v"), ("b", "w")], 1):
        opened.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="r", proposal_id=None)
    yield opened
    opened.close()


def test_it_is_a_new_release_with_its_proposal_and_its_audit_row(ledger: Ledger) -> None:
    row = roll_back_offline(ledger, ["clip", "vlm"], to=None, actor="ann", reason="nothing starts")
    assert (row.number, row.clip, row.vlm, row.actor, row.reason) == (4, "a", "v", "ann", "nothing starts")
    (proposal,) = ledger.proposals()
    assert (proposal.kind, proposal.state, proposal.release) == ("rollback", "committed", 4)
    assert "rolled back offline" in {entry.action for entry in ledger.audit_rows(subject="release 4")}


def test_a_family_that_is_not_named_stays_what_is_live(ledger: Ledger) -> None:
    row = roll_back_offline(ledger, ["vlm"], to=1, actor="ann", reason="r")
    assert (row.clip, row.vlm) == ("b", None)


def test_updates_wait_after_it_as_after_any_rollback_of_an_operator(ledger: Ledger) -> None:
    roll_back_offline(ledger, ["clip", "vlm"], to=None, actor="ann", reason="r", hold_after_rollback=True)
    held = ledger.held()
    assert held is not None and "after the rollback of release 3" in held.reason


def test_a_release_that_does_not_exist_or_another_live_one_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        roll_back_offline(ledger, ["clip"], to=9, actor="ann", reason="r")
    with pytest.raises(ReleaseConflict, match="release 3 is live, not 2"):
        roll_back_offline(ledger, ["clip"], to=1, actor="ann", reason="r", expected_live=2)
    assert ledger.proposals() == []


def test_the_command_needs_no_server(ledger: Ledger, tmp_path: Path) -> None:
    words = ["--set", f"home={tmp_path}", "releases", "rollback", "--offline", "--to", "1", "-r", "no server starts"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "release 4 is in the ledger" in result.output
    live = ledger.live()
    assert live is not None and (live.number, live.clip) == (4, None)
    assert ledger.held() is not None  # rollout.hold_after_rollback
