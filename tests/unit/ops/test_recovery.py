from __future__ import annotations

import json
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from sqlalchemy import text, update

from core.artifacts import Artifacts, directory_digest
from core.errors import ConfigError, LedgerError, StoreError
from core.ledger import Ledger
from core.ledger import rows as t
from core.ledger.collection import COLLECT_LEASE
from core.ledger.database import open_database
from core.settings import Settings
from ops.collection import Collector
from ops.recovery import back_up, backup, restore
from ops.recovery.ledger_rows import load_ledger
from ops.recovery.place import Place
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.command_line import ratchet
from tests.support.samples import TOPIC, put, refusal, sample
from tests.unit.conftest import create_database
from tests.unit.core.ledger.steps import remake

on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""For tests of files: the ledger is just another file there."""
WHEN = datetime(2026, 5, 1, 12, 30, 15, 123456, tzinfo=UTC)
WEIGHTS = bytes(range(256)) * 40_000
"""Larger than what is copied in one piece."""


def database(url: str, name: str) -> str:
    """An empty database of the kind of ``url``."""
    if url.startswith("sqlite"):
        return url.replace("ledger.db", f"{name}.db")
    return create_database(url, f"{url.rsplit('/', 1)[1]}_{name}")


def settings_of(home: Path, ledger: str, **values: Any) -> Settings:
    return Settings.model_validate(
        {"home": home, "ledger_url": ledger, "maintain": {"keep_seconds": 0}, "kafka": {"events_topic": ""}, **values}
    )


class Move:
    """An installation, the place of its backup, and an empty installation elsewhere."""

    def __init__(self, folder: Path, url: str, ledger: Ledger) -> None:
        self.folder, self.ledger, self.url = folder, ledger, url
        self.here = settings_of(folder / "old", url)
        self.there = settings_of(folder / "new", database(url, "restored"))
        self.target = str(folder / "backup")
        self.artifacts, self.store = Artifacts(self.here.artifacts), SampleStore(self.here.lake)

    def back_up(self) -> backup.Report:
        return back_up(self.here, self.target, "ann")

    def restore(self) -> backup.Report:
        return restore(self.there, self.target, "bob")

    def check(self) -> None:
        """Both installations have the same rows, files and samples."""
        assert rows(self.there.ledger) == rows(self.here.ledger)
        assert files(Path(self.there.artifacts)) == files(Path(self.here.artifacts))
        assert samples(self.there) == samples(self.here)


@pytest.fixture
def move(tmp_path: Path, url: str, ledger: Ledger) -> Move:
    made = Move(tmp_path, url, ledger)
    for name in ("clip-1", "clip-2"):
        add_adapter(tmp_path, made.artifacts, ledger, name)
    version = put(made.store, [sample(0, 0), sample(0, 1)], Position(TOPIC, 0, 2))
    made.store.pin("u-open", version)
    put(made.store, [sample(0, 2), refusal(0, 3), sample(1, 0)], Position(TOPIC, 0, 4), Position(TOPIC, 1, 1))
    begin(ledger, "u-open", version, "clip-2")
    begin(ledger, "u-1", 1, None, adapter="clip-1")
    ledger.record_verdict("u-1", "clip-1", "passed", "reports/u-1", {"suites": {"a": {"after": 0.5}}, "x": None})
    made.artifacts.write_bytes("reports/u-1/report.json", b'{"a": 1}')
    with ledger.database.write() as session:
        session.execute(update(t.VerdictRow).values(created_at=WHEN))
    ledger.acquire_lease("events", "old", 600)
    return made


def add_adapter(folder: Path, artifacts: Artifacts, ledger: Ledger, name: str) -> None:
    source = folder / "made" / name
    source.mkdir(parents=True)
    (source / "adapter.safetensors").write_bytes(name.encode() + WEIGHTS)
    (source / "config.json").write_text("{}")
    artifacts.put_directory(source, f"adapters/{name}")
    ledger.register_adapter(name, "clip", "b" * 64, f"{name}-i", "t", {"rank": 4}, digest=directory_digest(source))
    live = ledger.live()
    ledger.commit_release(live.number + 1 if live else 1, clip=name, vlm=None, actor="a", reason="r", proposal_id=None)


def begin(ledger: Ledger, name: str, version: int, incumbent: str | None, adapter: str | None = None) -> None:
    what: dict[str, Any] = {"recipe": {"name": "r"}, "seed": 0, "data_from": {}, "data_to": {"t:0": 4}}
    ledger.begin_update(name, family="clip", store_version=version, incumbent=incumbent, adapter=adapter, **what)


def rows(url: str) -> dict[str, Any]:
    with closing(Ledger.open(url)) as opened:
        return {
            "live": opened.live(), "releases": opened.releases(), "updates": opened.updates(),
            "keys": opened.api_keys(), "verdicts": opened.verdicts(),
            "adapters": [opened.adapter(use.name) for use in opened.adapter_uses()],
            "audit": [row for row in opened.audit_rows() if row.action not in ("restore", "back up")],
        }  # fmt: skip


def samples(settings: Settings, version: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = SampleStore(settings.lake).scan(version).to_pylist()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_restored_installation_has_the_same_rows_files_and_samples_and_goes_on(move: Move) -> None:
    report = move.back_up()
    assert move.restore() == report
    move.check()
    old, store = move.store, SampleStore(move.there.lake)
    assert (store.version(), store.offsets(), store.tally()) == (old.version(), old.offsets(), old.tally())
    assert store.table.identity() == old.table.identity()
    with closing(Ledger.open(move.there.ledger)) as opened:
        [restored] = opened.audit_rows(actor="bob")
        assert (restored.action, restored.detail["release"]) == ("restore", 2)
        assert opened.acquire_lease("events", "new", 60) == 1, "the old installation's lease is not taken over"
        add_adapter(move.folder, Artifacts(move.there.artifacts), opened, "clip-3")
        assert opened.propose("release", clip="clip-1", actor="a", reason="r").id == 1
        begin(opened, "u-2", 1, None, adapter="clip-3")
        assert opened.record_verdict("u-2", "clip-3", "passed", "reports/u-2", {}).id == 2
        put(store, [sample(0, 4)], Position(TOPIC, 0, 5))
        assert store.offsets() == {f"{TOPIC}:0": 5, f"{TOPIC}:1": 1}
        pinned = opened.update("u-open").store_version
        assert [row["offset"] for row in samples(move.there, pinned)] == [0, 1]
        Maintainer(move.there, opened, store).run_once()
        assert (store.pins(), store.count()) == ({"u-open": pinned}, 5)


def test_a_ledger_restored_into_a_database_of_the_other_kind_is_the_same(move: Move) -> None:
    """The portable form of PostgreSQL's rows restores into SQLite; SQLite's file does under another name."""
    other = settings_of(move.folder / "new", f"sqlite:///{move.folder}/other.db")
    move.back_up()
    restore(other, move.target, "bob")
    assert rows(other.ledger) == rows(move.here.ledger)
    assert rows(other.ledger)["verdicts"][0].created_at == WHEN


@on_sqlite
def test_what_happens_during_a_backup_does_not_break_it(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the ledger is copied: a release, a commit of ingest, compaction, a collector."""
    ledger, store = move.ledger, move.store
    write_ledger, version_files = backup.write_ledger, backup.version_files
    meanwhile: list[Any] = []

    def written(*arguments: Any) -> Any:
        result = write_ledger(*arguments)
        add_adapter(move.folder, move.artifacts, ledger, "clip-9")
        put(store, [sample(0, 4)], Position(TOPIC, 0, 5))
        meanwhile.append(Collector(move.here, ledger, move.artifacts).run())
        return result

    def listed(*arguments: Any) -> Any:
        result = version_files(*arguments)
        put(store, [sample(0, 5)], Position(TOPIC, 0, 6))
        for _ in range(2):
            Maintainer(move.here, ledger, store).run_once()  # keep_seconds is 0: only pins keep old files
        return result

    monkeypatch.setattr(backup, "write_ledger", written)
    monkeypatch.setattr(backup, "version_files", listed)
    report = move.back_up()
    assert meanwhile == [None], "the collector waits"
    assert report.missing == ()
    move.restore()
    restored = rows(move.there.ledger)
    assert restored["live"].clip == "clip-2"
    for adapter in restored["adapters"]:
        Artifacts(move.there.artifacts).fetch(f"adapters/{adapter.name}", adapter.digest)
    assert SampleStore(move.there.lake).offsets() == {f"{TOPIC}:0": 5, f"{TOPIC}:1": 1}
    assert len(samples(move.there)) == 5
    assert store.pins().keys() == {"u-open"}


@on_sqlite
def test_a_lost_file_is_named_and_a_killed_backup_lets_its_pin_go(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "_artifact_files", lambda _: {"reports/u-9/report.json": 2})
    with pytest.raises(StoreError, match=r"report\.json was deleted while"):
        move.back_up()
    store, ledger = move.store, move.ledger
    assert store.pins().keys() == {"u-open"}
    store.pin("backup-1", store.version())
    epoch = ledger.acquire_lease(COLLECT_LEASE, "backup", 60)
    assert epoch is not None
    maintainer = Maintainer(move.here, ledger, store)
    maintainer.run_once()
    assert "backup-1" in store.pins(), "it still runs"
    ledger.release_lease(COLLECT_LEASE, epoch)
    maintainer.run_once()
    assert store.pins().keys() == {"u-open"}


class Killed(BaseException):
    """Stands for the end of the process."""


class Mortal(Place):
    """A store whose user is killed after this many writes, counted over all stores opened meanwhile."""

    left = 0
    lock = threading.Lock()

    def write(self, name: str, data: bytes) -> None:
        self._live()
        super().write(name, data)

    def put(self, source: Path, name: str) -> None:
        self._live()
        super().put(source, name)

    def _live(self) -> None:
        with self.lock:
            if Mortal.left == 0:
                raise Killed
            Mortal.left -= 1


@on_sqlite
@pytest.mark.parametrize("writes", [1, 4, 9, 14])
def test_a_backup_that_was_interrupted_is_completed(move: Move, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Mortal.left = writes
        patch.setattr(backup, "Place", Mortal)
        move.back_up()
    with pytest.raises(ConfigError, match="no complete backup"):
        move.restore()
    report = move.back_up()
    assert report.files == len(files(Path(move.target))) - 3, "the ledger, the list of files and the summary"
    move.restore()
    assert rows(move.there.ledger) == rows(move.here.ledger)


@on_sqlite
@pytest.mark.parametrize("writes", [0, 3, 8])
def test_a_restore_that_was_interrupted_is_completed(move: Move, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    move.back_up()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Mortal.left = writes
        patch.setattr("ops.recovery.restoration.Place", Mortal)
        move.restore()
    move.restore()
    move.check()
    with pytest.raises(ConfigError, match="not empty"):
        move.restore()


def test_nothing_is_restored_over_something_else(move: Move) -> None:
    move.back_up()
    with pytest.raises(ConfigError, match="the ledger is not empty"):
        restore(settings_of(move.folder / "a", move.here.ledger), move.target, "bob")
    for what in ("artifacts", "lake"):
        home = move.folder / f"with-{what}"
        (home / what).mkdir(parents=True)
        (home / what / "file").write_text("mine")
        with pytest.raises(ConfigError, match=rf"{what} are not empty.*{what}_url"):
            restore(settings_of(home, database(move.url, what)), move.target, "bob")
        assert files(home / what)["file"] == b"mine"
    with pytest.raises(ConfigError, match="has a complete backup"):
        move.back_up()
    with pytest.raises(ConfigError, match="has other files"):
        back_up(move.here, str(move.folder / "with-lake"), "ann")


@on_sqlite
@pytest.mark.parametrize("which", ["adapter.safetensors", "samples.lance/data", "report.json", "ledger", "files.json"])
def test_a_damaged_file_is_found_before_the_ledger_names_it(move: Move, which: str) -> None:
    move.back_up()
    name, data = next((name, bytearray(data)) for name, data in files(Path(move.target)).items() if which in name)
    data[len(data) // 2] ^= 1
    (Path(move.target) / name).write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        move.restore()
    assert not rows(move.there.ledger)["releases"]


@on_sqlite
def test_a_backup_through_an_object_store_is_restored_into_one(move: Move) -> None:
    name = move.folder.name
    move.target, artifacts = f"memory://backup-{name}", f"memory://artifacts-{name}"
    move.back_up()
    first = settings_of(move.folder / "first", database(move.url, "first"), artifacts_url=artifacts)
    restore(first, move.target, "bob")
    Artifacts(artifacts).write_bytes("adapters/clip-half/adapter.safetensors", b"an upload that was interrupted")
    back_up(first, f"memory://again-{name}", "ann")
    restore(move.there, f"memory://again-{name}", "bob")
    assert files(Path(move.there.artifacts)) == files(Path(move.here.artifacts))
    assert rows(move.there.ledger) == rows(move.here.ledger)


def test_a_backup_of_an_older_migration_is_migrated_and_one_of_a_newer_version_is_not_made(move: Move) -> None:
    opened = open_database(move.here.ledger, migrate=False)
    with opened._writing.connect() as connection, connection.begin():
        remake(connection, "0014")
    file, revision = backup.write_ledger(move.here.ledger, move.folder)
    assert revision == "0014"
    opened.close()
    Ledger.open(move.there.ledger).close()  # as `ratchet admin migrate` does before an install
    audit = {"actor": "a", "action": "restore", "subject": "s", "detail": {}, "created_at": WHEN}
    load_ledger(file, revision, move.there.ledger, audit)
    Ledger.open(move.here.ledger).close()
    assert rows(move.there.ledger) == rows(move.here.ledger)
    with move.ledger.database.write() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(LedgerError, match="9999"):
        move.back_up()


@on_sqlite
def test_a_data_set_that_changes_meanwhile_is_copied_again(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = f"{move.here.lake}/catalog/clip_1.lance"
    lance.write_dataset(pa.table({"a": [1]}), catalog)
    whole, calls = backup.version_files, []

    def listed(lake: Place, name: str, versions: Any) -> dict[str, int]:
        found = whole(lake, name, versions)
        if name.startswith("catalog/") and not calls:
            calls.append(name)
            dataset = lance.write_dataset(pa.table({"a": [2]}), catalog, mode="overwrite")
            dataset.cleanup_old_versions(older_than=timedelta(0))
        return found

    monkeypatch.setattr(backup, "version_files", listed)
    move.back_up()
    assert calls == ["catalog/clip_1.lance"]
    move.restore()
    assert lance.dataset(f"{move.there.lake}/catalog/clip_1.lance").to_table().to_pydict() == {"a": [2]}


def test_the_commands_end_with_json(move: Move) -> None:
    reports = []
    for name, each in (("backup", move.here), ("restore", move.there)):
        done = ratchet(each.home, "--set", f"ledger_url={each.ledger}", "admin", name, move.target)
        assert done.exit_code == 0, done.output
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    assert reports[0] == reports[1] and reports[0]["release"] == 2
