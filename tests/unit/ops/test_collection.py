from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from core.artifacts import Artifacts
from core.errors import AdapterCollected, LeaseLost, LedgerError, LedgerUnavailable, ReleaseConflict
from core.ledger import Ledger
from core.ledger import rows as t
from core.ledger.collection import COLLECT_LEASE
from core.metrics import declared
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from ops import collection
from ops.collection import CollectionPlan, Collector
from serving.releases.rollback import rollback_target
from streams.store.maintenance import Maintainer
from tests.support.command_line import ratchet

BASE = "b" * 64
NOW = datetime.now(UTC) - timedelta(hours=1)
on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""Time of a test of a command, which opens the ledger that the settings name."""


class Installation:
    """A ledger, artifacts and a home; the newest entry is of :data:`NOW`."""

    def __init__(self, home: Path, ledger: Ledger, url: str | None = None) -> None:
        values = {"home": home, "artifacts_url": url, "gc": {"keep_releases": 2}, "kafka": {"events_topic": ""}}
        self.settings = Settings.model_validate(values)
        self.ledger = ledger
        self.artifacts = Artifacts(self.settings.artifacts, home / "cached")

    def adapter(self, name: str, days: float, family: str = "clip", base: str = BASE) -> str:
        source = self.settings.home / "made" / name
        source.mkdir(parents=True)
        (source / "adapter.safetensors").write_bytes(name.encode() * 10)
        for folder in ("adapters", "memories"):
            self.artifacts.put_directory(source, f"{folder}/{name}")
        self.ledger.register_adapter(name, family, base, "i", "t", {})
        self._set(t.AdapterRow, t.AdapterRow.name == name, days, "created_at")
        return name

    def judged(self, name: str, days: float, outcome: str = "rejected", **summary: Any) -> str:
        self.begin(f"u-{name}", adapter=name)
        self.ledger.advance_update(f"u-{name}", "done")
        self.artifacts.write_bytes(f"reports/u-{name}/report.json", b"{}")
        self.ledger.record_verdict(f"u-{name}", name, outcome, f"reports/u-{name}", summary)  # type: ignore[arg-type]
        self._set(t.UpdateRow, t.UpdateRow.id == f"u-{name}", days, "created_at", "updated_at")
        self._set(t.VerdictRow, t.VerdictRow.update_id == f"u-{name}", days, "created_at")
        return name

    def begin(self, name: str, incumbent: str | None = None, adapter: str | None = None) -> None:
        data: dict[str, Any] = {"store_version": 1, "data_from": {}, "data_to": {}}
        self.ledger.begin_update(
            name, family="clip", recipe={"name": "r"}, seed=0, incumbent=incumbent, adapter=adapter, **data
        )

    def release(self, clip: str | None, days: float, vlm: str | None = None, share: float = 1.0) -> int:
        live = self.ledger.live()
        number = live.number + 1 if live else 1
        self.ledger.commit_release(number, clip=clip, vlm=vlm, actor="a", reason="r", proposal_id=None, share=share)
        self._set(t.ReleaseRow, t.ReleaseRow.number == number, days, "created_at")
        return number

    def collector(self) -> Collector:
        return Collector(self.settings, self.ledger, self.artifacts)

    def run(self) -> CollectionPlan:
        plan = self.collector().run("ann")
        assert plan is not None
        return plan

    def stored(self, folder: str = "adapters") -> set[str]:
        return set(self.artifacts.sizes(folder))

    def reason(self, name: str, kind: str = "adapter") -> str:
        [item] = [item for item in self.collector().plan().items if (item.kind, item.name) == (kind, name)]
        return ("goes: " if item.goes else "stays: ") + item.reason

    def _set(self, table: Any, where: Any, days: float, *columns: str) -> None:
        with self.ledger.database.write() as session:
            session.execute(update(table).where(where).values({name: NOW - timedelta(days=days) for name in columns}))


@pytest.fixture
def made(tmp_path: Path, ledger: Ledger) -> Installation:
    return Installation(tmp_path, ledger)


@pytest.fixture(params=["folder", "memory"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installation]:
    ledger = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    yield Installation(tmp_path, ledger, None if request.param == "folder" else f"memory://{tmp_path.name}")
    ledger.close()


def released(made: Installation, count: int = 6) -> list[str]:
    """This many releases, 200 days apart, the last one now."""
    names = [made.adapter(f"clip-{number}", 200.0 * (count - number)) for number in range(1, count + 1)]
    for number, name in enumerate(names, 1):
        made.release(name, 200.0 * (count - number))
    return names


def test_adapters_outside_of_the_window_go_with_their_carry_over(either: Installation) -> None:
    names = released(either)
    plan = either.run()
    assert either.stored() == either.stored("memories") == {"clip-5", "clip-6"}
    assert {item.name for item in plan.going if item.kind == "adapter"} == set(names[:4])
    bare = 2 * sum(len(name) * 10 for name in names[:4])
    assert plan.freed == bare if either.artifacts.local else plan.freed > bare, "an object store has manifests, too"
    assert either.run().items == ()


def test_what_was_used_lately_stays_and_a_plan_deletes_nothing(made: Installation) -> None:
    """An adapter counts as used until another one replaced it."""
    for number, days in enumerate((1000, 50, 40, 0)):
        made.release(made.adapter(f"clip-{number}", days), days)
    names = {made.adapter("clip-young", 80), made.adapter("clip-old", 100), *(f"clip-{number}" for number in range(4))}
    assert "used 50 days ago" in made.reason("clip-0") and "used 80 days ago" in made.reason("clip-young")
    assert made.reason("clip-old").startswith("goes")
    assert made.stored() == names and not made.ledger.collected(list(names))


def test_what_a_canary_runs_beside_and_what_a_rollback_goes_back_to_stays(made: Installation) -> None:
    for name, days in (("clip-old", 900), ("clip-stable", 800)):
        made.release(made.adapter(name, days), days)
    for days in (400, 300, 200, 0):  # one trial after another, and nothing was promoted
        made.release(made.adapter(f"clip-canary-{days}", days), days, share=0.1)
    made.run()
    assert {"clip-stable", "clip-old", "clip-canary-0"} <= made.stored()


def test_a_rollback_of_one_model_stays_possible_after_many_releases_of_the_other(made: Installation) -> None:
    for number in (1, 2):
        made.adapter(f"vlm-{number}", 2000 - number, family="vlm")
        made.release(None, 2000 - number, vlm=f"vlm-{number}")
    for number in range(8):
        made.release(made.adapter(f"clip-{number}", 800 - 100 * number), 800 - 100 * number, vlm="vlm-2")
    made._set(t.ReleaseRow, t.ReleaseRow.number == 10, 0, "created_at")
    made.run()
    assert {"vlm-1", "vlm-2", "clip-6", "clip-7"} <= made.stored()
    assert rollback_target(made.ledger, ("vlm",), None) == {"vlm": "vlm-1"}


def test_the_best_releases_of_a_suite_stay(made: Installation) -> None:
    scores = {"clip-1": 0.9, "clip-2": 0.2, "clip-3": 0.3, "clip-4": 0.3, "clip-5": 0.3, "clip-6": 0.3}
    for number, name in enumerate(released(made), 1):
        suites = {
            "flags": {"after": scores[name], "base": 0.1, "role": "retention"},
            "mine": {"after": 1.0 if name == "clip-3" else 0.0, "base": 0.0, "role": "gain"},
            f"fresh.{'emoji' if name == 'clip-2' else 'other'}": {"after": 0.5, "base": 0.1, "role": "gain"},
        }
        made.judged(name, 200.0 * (6 - number), "passed", suites=suites)
    assert made.reason("clip-1") == "stays: best release on average"
    assert made.reason("clip-2") == "stays: best release on fresh.emoji"
    assert made.reason("clip-3").startswith("goes")
    assert "its adapter stays" in made.reason("clip-1", "carry-over")


def test_what_is_not_decided_the_other_base_and_an_upgrade_that_waits_stay(made: Installation) -> None:
    third = "d" * 64
    made.release(made.adapter("clip-other", 900, base="c" * 64), 900)
    released(made)
    kept = {"clip-candidate", "clip-incumbent", "clip-proposed", "clip-newest", "clip-named"}
    for name in kept:
        made.adapter(name, 500)
    made.begin("u1", incumbent="clip-incumbent")
    made.begin("u2", adapter="clip-candidate")
    made.ledger.propose("release", clip="clip-proposed", actor="a", reason="r")
    made._set(t.UpdateRow, t.UpdateRow.id.in_(["u1", "u2"]), 0, "created_at", "updated_at")
    made.judged("clip-newest", -0.01, "inconclusive")
    gc = made.settings.gc.model_copy(update={"keep_adapters": ["clip-named"]})
    made.settings = made.settings.model_copy(update={"gc": gc})
    made.adapter("clip-upgraded", 500, base=third)
    made.ledger.begin_base_upgrade(
        "up", recipe={}, seed=0, store_version=1, data_to={}, incumbent=None, old=(BASE, "b"), new=(third, "d"),
        gflops=1.0, actor="a",
    )  # fmt: skip
    made.ledger.advance_update("up", "done", adapter="clip-upgraded")
    made.ledger.record_verdict("up", "clip-upgraded", "passed", "reports/up", {})
    made._set(t.UpdateRow, t.UpdateRow.id == "up", 500, "created_at", "updated_at")
    made.run()
    assert made.stored() == {*kept, "clip-other", "clip-upgraded", "clip-5", "clip-6"}


def test_carry_over_stays_where_an_update_may_begin_and_reports_for_a_year(made: Installation) -> None:
    for name in released(made, 2):
        made.judged(name, 800)
    for days in (370, 360, 10, 5):
        made.judged(made.adapter(f"clip-{days}-days", days), days)
    for folder in ("adapters", "memories"):  # what the ledger does not know
        made.artifacts.put_directory(made.settings.home / "made" / "clip-1", f"{folder}/clip-unknown")
    for name in ("reports/gate-by-hand/report.json", "residency.json"):
        made.artifacts.write_bytes(name, b"{}")
    made.run()
    assert {"clip-10-days", "clip-5-days", "clip-unknown"} <= made.stored()
    assert made.stored("memories") == {"clip-1", "clip-2", "clip-5-days", "clip-unknown"}
    young = {f"u-clip-{days}-days" for days in (360, 10, 5)}
    assert made.stored("reports") == {"u-clip-1", "u-clip-2", *young, "gate-by-hand"}
    assert made.artifacts.exists("residency.json")


def test_a_ledger_that_is_empty_ahead_of_time_or_away_deletes_nothing(
    either: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise LedgerUnavailable("the ledger is away.")

    names, full = released(either), either.ledger
    with closing(Ledger.open(f"sqlite:///{tmp_path}/empty.db")) as empty:  # a wrong ledger_url with the right artifacts
        either.ledger = empty
        assert either.run().items == ()
    either.ledger = full
    with monkeypatch.context() as patch, pytest.raises(LedgerUnavailable):
        patch.setattr(full, "begin_collection", away)
        either.run()
    either._set(t.ReleaseRow, t.ReleaseRow.number == 6, -10_000, "created_at")
    with pytest.raises(LedgerError, match="clock"):
        either.run()
    assert either.stored() == set(names)


def test_after_a_collection_release_and_rollback_say_what_became_of_the_files(made: Installation) -> None:
    released(made)
    made.run()
    for number, name in ((1, "clip-1"), (4, "clip-4")):
        with pytest.raises(AdapterCollected, match=rf"{name} were collected on .*adapters import DIR"):
            rollback_target(made.ledger, ("clip",), number)
        with pytest.raises(AdapterCollected, match=name):
            made.ledger.propose("release", clip=name, actor="a", reason="r", forced=True)
        with pytest.raises(AdapterCollected, match=name):
            fetch_recorded(made.artifacts, made.ledger, name)
        with pytest.raises(AdapterCollected, match=name):
            made.release(name, 0)
    assert rollback_target(made.ledger, ("clip",), None) == {"clip": "clip-5"}
    [row] = made.ledger.audit_rows(subject="adapter clip-1")
    assert (row.actor, row.action, row.detail) == ("ann", "collect", {"reason": "not used for 800 days"})
    [total] = made.ledger.audit_rows(subject="artifacts")
    assert total.detail["adapter"] == 4 and total.detail["bytes"] > 0

    made.ledger.register_adapter("clip-1", "clip", BASE, "i", "t", {})
    made.artifacts.put_directory(made.settings.home / "made" / "clip-1", "adapters/clip-1")
    assert made.ledger.collected(["clip-1"]) == {}, "an adapter that is made again is there"
    made.release("clip-1", 0)


def test_a_default_rollback_passes_over_what_was_collected(made: Installation) -> None:
    released(made, 3)
    with made.ledger.database.write() as session:
        session.execute(update(t.AdapterRow).where(t.AdapterRow.name == "clip-2").values(collected_at=NOW))
    assert rollback_target(made.ledger, ("clip",), None) == {"clip": "clip-1"}


@pytest.mark.parametrize("step", ["delete", "finish_collection"])
def test_an_interrupted_collection_is_completed(
    either: Installation, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    released(either)

    def kill(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(either.artifacts if step == "delete" else either.ledger, step, kill)
        with pytest.raises(SystemExit):
            either.run()
    with pytest.raises(LedgerError, match="being collected"):
        either.ledger.register_adapter("clip-1", "clip", BASE, "i", "t", {})
    either.run()
    assert either.stored() == either.stored("memories") == {"clip-5", "clip-6"}
    either.ledger.register_adapter("clip-1", "clip", BASE, "i", "t", {})


def test_of_two_collectors_one_works_and_what_is_proposed_between_plan_and_deletion_stays(made: Installation) -> None:
    released(made)
    made.ledger.propose("release", clip="clip-1", actor="a", reason="r")
    epoch = made.ledger.acquire_lease(COLLECT_LEASE, "another", 60)
    assert made.collector().run() is None and len(made.stored()) == 6
    assert epoch is not None
    with pytest.raises(LeaseLost):
        made.ledger.begin_collection({}, live=6, epoch=epoch - 1, actor="a")
    names = {"clip-1": "old", "clip-2": "old"}
    assert made.ledger.begin_collection(names, live=6, epoch=epoch, actor="a") == ["clip-2"]
    with pytest.raises(ReleaseConflict):
        made.ledger.begin_collection(names, live=5, epoch=epoch, actor="a")


def test_a_release_during_the_decision_makes_a_new_one(made: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    released(made)
    plans = iter([lambda: made.release("clip-2", 0), lambda: None])
    whole = collection.make_plan

    def interrupted(*arguments: Any) -> CollectionPlan:
        plan = whole(*arguments)
        next(plans)()
        return plan

    monkeypatch.setattr(collection, "make_plan", interrupted)
    made.run()
    assert "clip-2" in made.stored()
    assert "clip-1" not in made.stored()


def test_work_folders_of_updates_that_are_over_and_unused_caches_go(made: Installation) -> None:
    home = made.settings.home
    released(made)
    made.begin("u-open")
    made.begin("u-over")
    made.ledger.advance_update("u-over", "failed")
    ages = dict.fromkeys(("updates/u-open/x", "updates/u-over/x", "updates/u-unknown/x", "cache/gate/new.npz"), 0)
    ages |= {"cache/gate/old.npz": 100, "cache/gate/future.npz": -100, "engines/" + "a" * 12: 100}
    for name, days in ages.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"x")
        os.utime(home / name, 2 * (time.time() - 86_400 * days,))
    made.run()
    assert {path.name for path in (home / "updates").iterdir()} == {"u-open", "u-unknown"}
    assert {path.name for path in (home / "cache" / "gate").iterdir()} == {"new.npz", "future.npz"}
    assert not list((home / "engines").iterdir())


@on_sqlite
def test_the_command_says_what_goes_and_what_stays_and_maintenance_collects_as_well(made: Installation) -> None:
    def run(*words: str) -> str:
        return ratchet(made.settings.home, "--set", "gc.keep_releases=2", *words).output

    released(made)
    shown = run("admin", "gc", "--dry-run")
    assert "not used for 800 days" in shown and "release 6 answers" in shown
    summary = json.loads(shown.splitlines()[-1])
    assert summary["dry_run"] is True
    assert summary["goes"] == {"adapter": 4, "carry-over": 4}
    assert summary["stays"] == {"adapter": 2, "carry-over": 2}
    assert summary["adapters"] == ["clip-1", "clip-2", "clip-3", "clip-4"]
    assert len(made.stored()) == 6

    total = declared.COLLECTED.labels("adapter")._value
    before, calls = total.get(), []
    done = json.loads(run("admin", "gc").splitlines()[-1])
    assert done["freed_bytes"] == summary["freed_bytes"]
    assert (made.stored(), total.get() - before) == ({"clip-5", "clip-6"}, 4 * 60)
    assert "collected" in run("releases", "list")
    assert "clip-1 was collected" in run("releases", "show", "1")

    with closing(Maintainer(made.settings, collect=lambda: calls.append(1))) as maintainer:
        for _ in range(2):
            maintainer.run_once()
    assert len(calls) == 1, "maintenance collects every so often"
