from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from core.errors import ReleaseConflict
from core.ledger import Ledger, ReleaseRow, UpdateRow
from tests.unit.core.ledger.steps import of_revision, release

OLD, NEW = "o" * 64, "n" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for name, base in (("a", OLD), ("n", NEW), ("m", NEW)):
        made.register_adapter(name, "clip", base, f"i-{name}", f"t-{name}", {})
    return made


def change(ledger: Ledger, clip: str | None, base: str = NEW, live: ReleaseRow | None = None) -> ReleaseRow:
    live = live or ledger.live()
    assert live is not None
    return ledger.change_base(live, clip=clip, base=base, live_base=OLD, rollback=False, actor="ann", reason="better")


def passed(ledger: Ledger, update_id: str, adapter: str) -> UpdateRow:
    update = ledger.begin_base_upgrade(
        update_id, recipe={"name": "default.upgrade"}, seed=0, store_version=3, data_to={"t:0": 5}, incumbent="a",
        old=(OLD, "old"), new=(NEW, "new"), gflops=7.0, actor="ann",
    )  # fmt: skip
    ledger.advance_update(update_id, "trained", adapter=adapter)
    ledger.record_verdict(update_id, adapter, "passed", "report", {})
    ledger.advance_update(update_id, "done")
    return update


def test_a_release_has_the_base_of_its_adapter_and_the_base_alone_that_of_what_was_live(ledger: Ledger) -> None:
    bases = [release(ledger, clip).clip_base for clip in (None, "not recorded", "a", None, "not recorded")]
    assert bases == [None, None, OLD, OLD, OLD]


def test_a_ledger_of_the_version_before_knows_the_base_of_each_adapter(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"

    def prepare(opened: Ledger) -> None:
        opened.register_adapter("a", "clip", OLD, "i", "t", {})
        for clip in (None, "a", "not recorded"):
            release(opened, clip)

    with of_revision(url, "0008", prepare) as connection:
        columns = list(connection.execute(text("select * from releases")).keys())
        assert "clip_base" not in columns
    with closing(Ledger.open(url)) as upgraded:
        assert [row.clip_base for row in upgraded.releases()] == [None, OLD, None]


def test_releases_are_asked_for_by_their_base(ledger: Ledger) -> None:
    release(ledger, None, vlm="v")
    release(ledger, "a", vlm="w")
    change(ledger, "n")
    release(ledger, "m", vlm="w")
    assert [row.number for row in ledger.releases(9, NEW)] == [4, 3]
    assert [row.number for row in ledger.releases(9, OLD)] == [2, 1], "what named no base is of the old one now"
    assert [row.number for row in ledger.releases(9)] == [4, 3, 2, 1]
    assert ledger.before("clip", "m", NEW) == ledger.release(3)
    assert ledger.before("clip", "n", NEW) == ledger.release(4)
    assert ledger.before("vlm", "w", NEW) is None and ledger.before("vlm", "w") == ledger.release(1)
    assert ledger.incumbent(3, NEW) is None and ledger.incumbent(3) == ledger.release(2)


def test_a_change_of_base_keeps_the_vlm_and_leaves_its_proposal_committed(ledger: Ledger) -> None:
    release(ledger, "a", vlm="v")
    row = change(ledger, "n")
    assert (row.number, row.clip, row.vlm, row.clip_base, row.plain) == (2, "n", "v", NEW, True)
    (proposal,) = ledger.proposals()
    assert (proposal.state, proposal.release, proposal.kind) == ("committed", 2, "release")
    assert ledger.pending_proposals() == []
    assert "change base" in [each.action for each in ledger.audit_rows()]


def test_the_base_does_not_change_beside_a_trial_or_when_something_else_is_live(ledger: Ledger) -> None:
    first = release(ledger, "a")
    release(ledger, "a", share=0.1)
    with pytest.raises(ReleaseConflict, match="on trial"):
        change(ledger, "n")
    with pytest.raises(ReleaseConflict, match="cannot be next"):
        change(ledger, "n", live=first)
    assert [row.number for row in ledger.releases()] == [2, 1] and ledger.proposals() == []


def test_an_upgrade_is_approved_until_it_is_released_dropped_or_withdrawn(ledger: Ledger) -> None:
    release(ledger, "a")
    update = passed(ledger, "upgrade-1", "n")
    assert (update.state, update.data_from) == ("training", {})
    approved = ledger.approved_upgrade(NEW)
    assert approved is not None and (approved.old_name, approved.new_name, approved.gflops) == ("old", "new", 7.0)
    assert ledger.approved_upgrade(OLD) is None
    change(ledger, "n")
    assert ledger.approved_upgrade() is None
    passed(ledger, "upgrade-2", "m")
    assert ledger.approved_upgrade() is not None
    ledger.withdraw(["m"], actor="guard", subject="s", reason="r", evidence={})
    assert ledger.approved_upgrade() is None


def test_the_newest_release_of_each_base_is_known_with_its_image_space(ledger: Ledger) -> None:
    release(ledger, None)
    assert ledger.newest_of_each_base() == []
    release(ledger, "a")
    change(ledger, "n")
    release(ledger, "m", share=0.1)
    assert [row.number for row in ledger.newest_of_each_base()] == [3, 2]
    assert ledger.image_spaces_of_bases() == {"i-n", "i-a"}
