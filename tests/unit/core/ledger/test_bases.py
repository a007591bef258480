from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text

from core.errors import ReleaseConflict
from core.ledger import Ledger, ReleaseRow
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


def passed(ledger: Ledger, update_id: str, adapter: str) -> None:
    update = ledger.begin_base_upgrade(
        update_id, recipe={"name": "default.upgrade"}, seed=0, store_version=3, data_to={"t:0": 5}, incumbent="a",
        old=(OLD, "old"), new=(NEW, "new"), gflops=7.0, actor="ann",
    )  # fmt: skip
    assert (update.state, update.data_from) == ("training", {})
    ledger.advance_update(update_id, "trained", adapter=adapter)
    ledger.record_verdict(update_id, adapter, "passed", "report", {})
    ledger.advance_update(update_id, "done")


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


def test_releases_have_the_base_of_their_adapter_and_are_asked_for_by_it(ledger: Ledger) -> None:
    bases = [release(ledger, clip, vlm).clip_base for clip, vlm in ((None, "v"), ("not recorded", "v"), ("a", "w"))]
    assert bases == [None, None, OLD]
    assert release(ledger, None, "w").clip_base == OLD, "the base alone: that of what was live"
    change(ledger, "n")
    release(ledger, "m", vlm="w")
    release(ledger, "n", share=0.1)
    assert [row.number for row in ledger.releases(9, NEW)] == [7, 6, 5]
    assert [row.number for row in ledger.releases(9, OLD)] == [4, 3, 2, 1], "what named no base is of the old one now"
    assert [row.number for row in ledger.releases(2)] == [7, 6]
    assert ledger.before("clip", "m", NEW) == ledger.release(5)
    assert ledger.before("clip", "n", NEW) == ledger.release(6)
    assert ledger.before("vlm", "w", NEW) is None and ledger.before("vlm", "w") == ledger.release(2)
    assert ledger.incumbent(5, NEW) is None and ledger.incumbent(5) == ledger.release(4)
    assert [row.number for row in ledger.newest_of_each_base()] == [6, 4]
    assert ledger.image_spaces_of_bases() == {"i-m"}


def test_a_change_of_base_keeps_the_vlm_and_waits_for_the_end_of_a_trial(ledger: Ledger) -> None:
    first = release(ledger, "a", vlm="v")
    row = change(ledger, "n")
    assert (row.number, row.clip, row.vlm, row.clip_base, row.plain) == (2, "n", "v", NEW, True)
    (proposal,) = ledger.proposals()
    assert (proposal.state, proposal.release, proposal.kind) == ("committed", 2, "release")
    assert ledger.pending_proposals() == []
    assert "change base" in [each.action for each in ledger.audit_rows()]
    release(ledger, "a", share=0.1)
    with pytest.raises(ReleaseConflict, match="on trial"):
        change(ledger, "n")
    with pytest.raises(ReleaseConflict, match="cannot be next"):
        change(ledger, "n", live=first)
    assert [row.number for row in ledger.releases()] == [3, 2, 1] and len(ledger.proposals()) == 1


def test_an_upgrade_is_approved_until_it_is_released_dropped_or_withdrawn(ledger: Ledger) -> None:
    release(ledger, "a")
    passed(ledger, "upgrade-1", "n")
    approved = ledger.approved_upgrade(NEW)
    assert approved is not None and (approved.old_name, approved.new_name, approved.gflops) == ("old", "new", 7.0)
    assert ledger.approved_upgrade(OLD) is None
    change(ledger, "n")
    assert ledger.approved_upgrade() is None
    passed(ledger, "upgrade-2", "m")
    assert ledger.approved_upgrade() is not None
    ledger.withdraw(["m"], actor="guard", subject="s", reason="r", evidence={})
    assert ledger.approved_upgrade() is None
