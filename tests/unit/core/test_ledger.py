"""The ledger keeps its promises on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from core.errors import LedgerError, LedgerUnavailable, ReleaseConflict
from core.ledger import Ledger
from core.ledger.database import alembic_config
from core.ledger.tables import Base
from tests.support.ledger_limits import patient, patient_limits


def _update(ledger: Ledger, update_id: str = "u1") -> None:
    ledger.begin_update(
        update_id, family="clip", recipe={"name": "default"}, seed=0, store_version=3,
        data_from={"t:0": 0}, data_to={"t:0": 10}, incumbent=None,
    )  # fmt: skip


def _release(ledger: Ledger, number: int, clip: str | None = None) -> None:
    ledger.commit_release(number, clip=clip, vlm=None, actor="test", reason="test", proposal_id=None)


@pytest.mark.integration
def test_a_database_without_an_encoding_keeps_texts_of_any_script(ascii_url: str) -> None:
    with patient_limits():
        ledger = Ledger.open(patient(ascii_url))
        ledger.hold("Zoë", "смена 検査")
        assert ledger.held()
        assert [row.actor for row in ledger.audit_rows()] == ["Zoë"]
        assert "смена 検査" in str([row.detail for row in ledger.audit_rows()])
        ledger.close()


def test_the_migrations_make_exactly_the_tables_that_the_code_expects(ledger: Ledger) -> None:
    with ledger.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_a_ledger_of_the_first_schema_keeps_its_rows_and_learns_what_each_proposal_set(url: str) -> None:
    opened = Ledger.open(url)
    with opened.database._writing.connect() as connection, connection.begin():
        command.downgrade(alembic_config(connection), "0001")
        row = "insert into proposals (kind, clip, vlm, actor, reason, state, created_at, updated_at) values"
        for number, (kind, clip) in enumerate(
            [("initial", None), ("update", "clip-a"), ("release", "clip-b"), ("rollback", "clip-a")], 1
        ):
            now = "2026-01-01 00:00:00"
            values = {"id": number, "kind": kind, "clip": clip, "now": now}
            connection.execute(text(f"{row} (:kind, :clip, null, 'x', 'y', 'committed', :now, :now)"), values)
            release = "insert into releases (number, clip, actor, reason, proposal_id, created_at) values"
            connection.execute(text(f"{release} (:id, :clip, 'x', 'y', :id, :now)"), values)
    opened.close()
    upgraded = Ledger.open(url)
    found = [(row.kind, row.family, row.clip) for row in reversed(upgraded.proposals())]
    assert found == [
        ("initial", "both", None), ("update", "clip", "clip-a"), ("release", "clip", "clip-b"),
        ("rollback", "both", "clip-a"),
    ]  # fmt: skip
    assert [row.proposal_id for row in upgraded.releases()] == [4, 3, 2, 1]
    assert upgraded.propose("update", family="vlm", vlm="vlm-a", actor="u", reason="r").family == "vlm"
    upgraded.close()


def test_keys_from_before_searches_had_a_scope_may_search_as_before(url: str) -> None:
    opened = Ledger.open(url)
    for name, scopes in (("page", ["infer"]), ("both", ["infer", "publish"]), ("ops", ["operate"])):
        opened.create_key(name, scopes, actor="t")
    with opened.database._writing.connect() as connection, connection.begin():
        command.downgrade(alembic_config(connection), "0010")
    opened.close()
    upgraded = Ledger.open(url)
    rights = {row.name: (row.scopes, row.expires_at) for row in upgraded.api_keys()}
    assert rights == {
        "page": (("infer", "search"), None), "both": (("infer", "search", "publish"), None),
        "ops": (("operate",), None),
    }  # fmt: skip
    with upgraded.database._writing.connect() as connection, connection.begin():
        command.downgrade(alembic_config(connection), "0010")
        rows = connection.execute(text("select name, scopes from api_keys order by name")).all()
    assert "search" not in str(rows)
    upgraded.close()


def test_a_ledger_that_a_newer_version_migrated_is_used_as_it_is(url: str) -> None:
    """The software was rolled back; the tables were not."""
    opened = Ledger.open(url)
    _release(opened, 1)
    with opened.database.write() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    opened.close()
    again = Ledger.open(url)
    assert [row.number for row in again.releases()] == [1]
    again.close()


def test_the_newest_release_with_another_adapter_is_found_per_family(ledger: Ledger) -> None:
    pairs: list[tuple[str | None, str | None]] = [(None, None), ("a", None), ("a", "v"), ("b", "v"), ("b", "v")]
    for number, (clip, vlm) in enumerate(pairs, 1):
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="t", proposal_id=None)
    found = [ledger.before("clip", "b"), ledger.before("vlm", "v"), ledger.before("clip", None)]
    assert [row.number if row else None for row in found] == [3, 2, 5]
    assert ledger.before("vlm", None) is not None


def _open_together(url: str) -> list[BaseException]:
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            Ledger.open(url).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_releases_of_an_older_schema_answer_everybody(url: str) -> None:
    opened = Ledger.open(url)
    _release(opened, 1)
    with opened.database._writing.connect() as connection, connection.begin():
        command.downgrade(alembic_config(connection), "0002")
    opened.close()
    upgraded = Ledger.open(url)
    assert [(row.share, row.plain) for row in upgraded.releases()] == [(1.0, True)]
    assert upgraded.stable() == upgraded.live()
    upgraded.close()


def test_the_stable_release_is_the_newest_plain_one(ledger: Ledger) -> None:
    assert ledger.stable() is None
    for number, share in enumerate((1.0, 0.1, 1.0, 0.0, 0.5), 1):
        ledger.commit_release(number, clip="a", vlm=None, actor="t", reason="t", proposal_id=None, share=share)
    stable = ledger.stable()
    assert stable is not None
    assert (stable.number, ledger.live().number) == (3, 5)  # type: ignore[union-attr]
    before = [ledger.incumbent(number) for number in (5, 3, 2, 1)]
    assert [row.number if row else None for row in before] == [3, 1, 1, None]


def test_a_share_is_between_nothing_and_everything(ledger: Ledger) -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(LedgerError, match="not between 0 and 1"):
            ledger.propose("release", clip="a", actor="a", reason="r", share=wrong)


def test_what_was_forced_or_is_a_canary_is_in_the_audit(ledger: Ledger) -> None:
    _release(ledger, 1)
    proposal = ledger.propose("release", clip="a", actor="ann", reason="sure", share=0.2, forced=True)
    assert (proposal.share, proposal.forced) == (0.2, True)
    ledger.commit_release(2, clip="a", vlm=None, actor="ann", reason="sure", proposal_id=proposal.id, share=0.2)
    release, propose, first = ledger.audit_rows(3)
    assert {(row.detail["share"], row.detail["forced"]) for row in (release, propose)} == {(0.2, True)}
    assert {"share", "forced"} & set(first.detail) == set()


def test_an_adapter_needs_force_until_it_passed_the_gate_or_was_live(ledger: Ledger) -> None:
    for name in ("passed", "served", "tried", "rejected"):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {})
        _update(ledger, name)
    ledger.record_verdict("passed", "passed", "passed", "r", {})
    ledger.record_verdict("rejected", "rejected", "rejected", "r", {})
    _release(ledger, 1, "served")
    ledger.commit_release(2, clip="tried", vlm=None, actor="t", reason="t", proposal_id=None, share=0.1)
    assert [ledger.unproven(name) for name in ("passed", "served")] == ["", ""]
    for name in ("tried", "rejected"):
        assert ledger.unproven(name) == f"{name} has no passed verdict in the ledger and was never live"
    ledger.withdraw(["passed", None], actor="guard", subject="release 3", reason="disagrees", evidence={"of": 40})
    ledger.withdraw(["passed"], actor="guard", subject="release 4", reason="again", evidence={})
    assert ledger.unproven("passed") == "passed was withdrawn: disagrees"
    assert ledger.withdrawn(["passed", "served", None]) == {"passed": "disagrees"}
    assert ledger.audit_rows(2)[1].detail == {"reason": "disagrees", "adapters": ["passed"], "of": 40}


def test_what_was_withdrawn_or_only_tried_is_nothing_to_go_back_to(ledger: Ledger) -> None:
    for number, (clip, share) in enumerate([(None, 1.0), ("a", 1.0), ("b", 0.1), ("c", 1.0)], 1):
        if clip is not None:
            ledger.register_adapter(clip, "clip", "base", f"i-{clip}", "t", {})
        ledger.commit_release(number, clip=clip, vlm=None, actor="t", reason="t", proposal_id=None, share=share)
    assert ledger.before("clip", "c").number == 2  # type: ignore[union-attr]
    ledger.withdraw(["a"], actor="guard", subject="release 2", reason="disagrees", evidence={})
    assert ledger.before("clip", "c").number == 1  # type: ignore[union-attr]
    assert ledger.before("vlm", "v").number == 4  # type: ignore[union-attr]


def _trials(ledger: Ledger) -> None:
    """Releases: base; a; b as a shadow; c as a canary, then promoted."""
    for number, (clip, share) in enumerate([(None, 1.0), ("a", 1.0), ("b", 0.0), ("c", 0.1), ("c", 1.0)], 1):
        if clip is not None:
            ledger.register_adapter(clip, "clip", "base", f"i-{clip}", "t", {})
        ledger.commit_release(number, clip=clip, vlm=None, actor="t", reason="t", proposal_id=None, share=share)


def test_what_answered_all_requests_is_known_however_it_was_tried_first(ledger: Ledger) -> None:
    _trials(ledger)
    assert [ledger.was_stable("clip", name) for name in (None, "a", "b", "c")] == [True, True, False, True]
    assert ledger.was_stable("vlm", None), "the base is that of every release"


def test_processes_that_start_together_migrate_once(url: str) -> None:
    assert _open_together(url) == []


def test_starting_together_on_a_new_file_never_finds_it_locked(tmp_path: Path) -> None:
    """One start in twelve lost this race; forty show it."""
    for number in range(40):
        assert _open_together(f"sqlite:///{tmp_path / str(number)}.db") == []


def test_releases_are_numbered_without_gaps_and_the_highest_is_live(ledger: Ledger) -> None:
    assert ledger.live() is None
    _release(ledger, 1)
    _release(ledger, 2, "clip-a")
    live = ledger.live()
    assert live is not None
    assert (live.number, live.clip) == (2, "clip-a")
    for wrong in (2, 1, 4):
        with pytest.raises(ReleaseConflict):
            _release(ledger, wrong)
    assert [row.number for row in ledger.releases()] == [2, 1]


def test_of_writers_that_race_for_a_number_exactly_one_wins(ledger: Ledger) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(6)

    def race(who: int) -> None:
        barrier.wait()
        try:
            ledger.commit_release(1, clip=f"clip-{who}", vlm=None, actor=str(who), reason="race", proposal_id=None)
            outcomes.append("won")
        except ReleaseConflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=race, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]
    assert len(ledger.releases()) == 1


def test_an_operator_who_looked_too_early_is_told(ledger: Ledger) -> None:
    _release(ledger, 1)
    ledger.propose("rollback", clip=None, vlm=None, actor="a", reason="r", expected_live=1)
    _release(ledger, 2)
    with pytest.raises(ReleaseConflict, match="release 2 is live, not 1"):
        ledger.propose("rollback", clip=None, vlm=None, actor="b", reason="r", expected_live=1)


def test_an_update_proposes_once_and_its_commit_marks_it(ledger: Ledger) -> None:
    _update(ledger)
    first = ledger.propose("update", clip="clip-a", vlm=None, actor="updater", reason="passed", update_id="u1")
    again = ledger.propose("update", clip="clip-a", vlm=None, actor="updater", reason="passed", update_id="u1")
    assert first.id == again.id
    assert [p.id for p in ledger.pending_proposals()] == [first.id]
    ledger.commit_release(1, clip="clip-a", vlm=None, actor="updater", reason="passed", proposal_id=first.id)
    assert ledger.pending_proposals() == []
    assert ledger.proposal(first.id).state == "committed"
    assert ledger.proposal(first.id).release == 1


def test_a_killed_updater_finds_its_update_again(ledger: Ledger) -> None:
    assert ledger.unfinished_update("clip") is None
    _update(ledger)
    _update(ledger)  # a restart begins the same update again
    assert len(ledger.updates()) == 1
    ledger.advance_update("u1", "trained", adapter="clip-a", cost={"steps": 5})
    found = ledger.unfinished_update("clip")
    assert found is not None
    assert (found.state, found.adapter, found.cost) == ("trained", "clip-a", {"steps": 5})
    ledger.advance_update("u1", "done", cost={"gate": 1})
    assert ledger.unfinished_update("clip") is None
    assert ledger.update("u1").cost == {"steps": 5, "gate": 1}
    with pytest.raises(LedgerError, match="u2"):
        ledger.advance_update("u2", "done")


def test_looks_count_verdicts_since_the_last_released_update(ledger: Ledger) -> None:
    for number in (1, 2):
        _update(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "rejected", "reports/x", {})
    assert _looked_at(ledger) == ["u1", "u2"], "what says nothing of it has spent"
    assert ledger.looks_since_release("vlm") == []
    for number, spent in ((3, False), (4, True), (5, False)):
        _update(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "inconclusive", "reports/x", {"spent": spent})
    assert _looked_at(ledger) == ["u1", "u2", "u4"]
    proposal = ledger.propose("update", clip="clip-5", vlm=None, actor="u", reason="r", update_id="u5")
    ledger.commit_release(1, clip="clip-5", vlm=None, actor="u", reason="r", proposal_id=proposal.id)
    assert _looked_at(ledger) == []


def _looked_at(ledger: Ledger) -> list[str]:
    return [verdict.update_id for verdict in ledger.looks_since_release("clip")]


def test_a_verdict_falls_once(ledger: Ledger) -> None:
    _update(ledger)
    ledger.record_verdict("u1", "clip-a", "rejected", "reports/u1", {"x": 1})
    assert ledger.record_verdict("u1", "clip-a", "passed", "reports/u1", {}).outcome == "rejected"


def test_an_adapter_name_is_never_reused(ledger: Ledger) -> None:
    ledger.register_adapter("clip-a", "clip", "base", "i1", "t1", {"rank": 8})
    assert ledger.register_adapter("clip-a", "clip", "base", "i1", "t1", {"rank": 8}).image_space == "i1"
    with pytest.raises(LedgerError, match="never reused"):
        ledger.register_adapter("clip-a", "clip", "base", "i2", "t1", {})
    with pytest.raises(LedgerError, match="clip-b"):
        ledger.adapter("clip-b")


def test_the_full_digest_of_an_adapter_is_recorded_once_and_stays(ledger: Ledger) -> None:
    first, second = "1" * 64, "2" * 64
    ledger.register_adapter("clip-old", "clip", "base", "i", "t", {})
    assert ledger.adapter_digests(["clip-old", None, "clip-none"]) == {}
    assert ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}, digest=first).digest == first
    assert ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}).digest == first
    with pytest.raises(LedgerError, match="another digest"):
        ledger.register_adapter("clip-old", "clip", "base", "i", "t", {}, digest=second)
    assert ledger.adapter_digests(["clip-old", None]) == {"clip-old": first}


def test_hold_and_resume_leave_who_and_why(ledger: Ledger) -> None:
    assert ledger.held() is None
    ledger.hold("ann", "incident")
    ledger.hold("bob", "another")
    held = ledger.held()
    assert held is not None
    assert held.actor == "ann"
    ledger.resume("ann", "over")
    assert ledger.held() is None
    with pytest.raises(LedgerError, match="not on hold"):
        ledger.resume("ann", "again")
    assert [row.action for row in ledger.audit_rows()] == ["resume", "hold"]


def test_a_charge_is_taken_once_and_settled_once(ledger: Ledger) -> None:
    bucket = {"now": 100.0, "rate": 1.0, "capacity": 10.0}
    assert ledger.charge("u1", 8, **bucket)
    assert ledger.charge("u1", 8, **bucket)
    assert ledger.bucket_level(100.0, 1.0, 10.0) == 2
    assert not ledger.charge("u2", 3, **bucket)
    ledger.settle("u1", 5, capacity=10.0)
    ledger.settle("u1", 1, capacity=10.0)
    assert ledger.bucket_level(100.0, 1.0, 10.0) == 5
    assert ledger.spent("u1") == 5
    assert ledger.spent() == 5
    with pytest.raises(LedgerError, match="u9"):
        ledger.settle("u9", 1, capacity=10.0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times=st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_a_clock_that_jumps_never_refills_more_than_the_time_that_passed(
    tmp_path_factory: pytest.TempPathFactory, times: list[float]
) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path_factory.mktemp('b') / 'l.db'}")
    ledger.bucket_level(times[0], 1.0, 1e9)
    ledger.charge("all", 1e9, now=times[0], rate=1.0, capacity=1e9)
    for now in times:
        level = ledger.bucket_level(now, 1.0, 1e9)
    assert level <= max(times) - times[0] + 1e-6
    ledger.close()


def test_a_database_that_cannot_be_used_is_a_clear_error_without_the_password() -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger.open("postgresql://ratchet:hunter2@127.0.0.1:1/none")
    assert "hunter2" not in str(caught.value)
    assert caught.value.fix
    with pytest.raises(LedgerError, match="ledger_url"):
        Ledger.open("nonsense")


def test_reads_of_one_block_share_a_connection_and_other_threads_have_their_own(ledger: Ledger) -> None:
    checkouts: list[object] = []
    event.listen(ledger.database.engine, "checkout", lambda *parts: checkouts.append(parts[0]))
    with ledger.reading():
        ledger.live()
        with ledger.reading():
            ledger.releases()
        ledger.held()
        assert len(checkouts) == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ledger.live).result()
        assert len(checkouts) == 2
    ledger.live()
    assert len(checkouts) == 3


def test_an_outage_inside_of_a_shared_read_is_named_as_anywhere(ledger: Ledger) -> None:
    with ledger.reading(), pytest.raises(LedgerUnavailable, match="gone"), ledger.database.read():
        raise OperationalError("select", {}, Exception("gone"))
