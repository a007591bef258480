from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from alembic import command
from sqlalchemy import text, update

from core.artifacts import Artifacts, directory_digest
from core.errors import ConfigError, LedgerError, StoreError
from core.ledger import Ledger
from core.ledger import rows as t
from core.ledger.collection import COLLECT_LEASE
from core.ledger.database import alembic_config, open_database
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

on_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)
"""For tests of files: the ledger is just another file there."""
WHEN = datetime(2026, 5, 1, 12, 30, 15, 123456, tzinfo=UTC)
WEIGHTS = bytes(range(256)) * 40_000
"""Larger than what is copied in one piece."""


def databases(url: str) -> Callable[[str], str]:
    """Makes empty databases of the kind of ``url``."""

    def make(name: str) -> str:
        if url.startswith("sqlite"):
            return url.replace("ledger.db", f"{name}.db")
        return create_database(url, f"{url.rsplit('/', 1)[1]}_{name}")

    return make


def settings_of(home: Path, ledger: str, **values: Any) -> Settings:
    return Settings.model_validate(
        {"home": home, "ledger_url": ledger, "maintain": {"keep_seconds": 0}, "kafka": {"events_topic": ""}, **values}
    )


@pytest.fixture
def settings(tmp_path: Path, url: str, ledger: Ledger) -> Settings:
    made = settings_of(tmp_path / "old", url)
    artifacts, store = Artifacts(made.artifacts), SampleStore(made.lake)
    for name in ("clip-1", "clip-2"):
        add_adapter(tmp_path, artifacts, ledger, name)
    version = put(store, [sample(0, 0), sample(0, 1)], Position(TOPIC, 0, 2))
    store.pin("u-open", version)
    put(store, [sample(0, 2), refusal(0, 3), sample(1, 0)], Position(TOPIC, 0, 4), Position(TOPIC, 1, 1))
    begin(ledger, "u-open", version, "clip-2")
    begin(ledger, "u-1", 1, None, adapter="clip-1")
    ledger.record_verdict("u-1", "clip-1", "passed", "reports/u-1", {"suites": {"a": {"after": 0.5}}, "x": None})
    artifacts.write_bytes("reports/u-1/report.json", b'{"a": 1}')
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


@pytest.fixture
def elsewhere(tmp_path: Path, url: str) -> Settings:
    return settings_of(tmp_path / "new", databases(url)("restored"))


def rows(url: str) -> dict[str, Any]:
    with closing(Ledger.open(url)) as opened:
        return {
            "live": opened.live(), "releases": opened.releases(), "updates": opened.updates(),
            "keys": opened.api_keys(), "verdicts": opened.verdicts(),
            "adapters": [opened.adapter(use.name) for use in opened.adapter_uses()],
            "audit": [row for row in opened.audit_rows() if row.action not in ("restore", "back up")],
        }  # fmt: skip


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "backup")


def same(one: Settings, other: Settings) -> bool:
    """Whether two installations have the same rows, files and samples."""
    assert rows(one.ledger) == rows(other.ledger)
    assert files(Path(one.artifacts)) == files(Path(other.artifacts))
    assert samples(one) == samples(other)
    return True


def samples(settings: Settings, version: int | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = SampleStore(settings.lake).scan(version).to_pylist()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_restored_installation_has_the_same_rows_files_and_samples_and_goes_on(
    settings: Settings, elsewhere: Settings, tmp_path: Path, target: str
) -> None:
    report = back_up(settings, target, "ann")
    assert restore(elsewhere, target, "bob") == report
    assert same(elsewhere, settings)
    old, store = SampleStore(settings.lake), SampleStore(elsewhere.lake)
    assert (store.version(), store.offsets(), store.tally()) == (old.version(), old.offsets(), old.tally())
    assert store.table.identity() == old.table.identity()
    with closing(Ledger.open(elsewhere.ledger)) as opened:
        [restored] = opened.audit_rows(actor="bob")
        assert (restored.action, restored.detail["release"]) == ("restore", 2)
        assert opened.acquire_lease("events", "new", 60) == 1, "the old installation's lease is not taken over"
        add_adapter(tmp_path, Artifacts(elsewhere.artifacts), opened, "clip-3")
        assert opened.propose("release", clip="clip-1", actor="a", reason="r").id == 1
        begin(opened, "u-2", 1, None, adapter="clip-3")
        assert opened.record_verdict("u-2", "clip-3", "passed", "reports/u-2", {}).id == 2
        put(store, [sample(0, 4)], Position(TOPIC, 0, 5))
        assert store.offsets() == {f"{TOPIC}:0": 5, f"{TOPIC}:1": 1}
        pinned = opened.update("u-open").store_version
        assert [row["offset"] for row in samples(elsewhere, pinned)] == [0, 1]
        Maintainer(elsewhere, opened, store).run_once()
        assert (store.pins(), store.count()) == ({"u-open": pinned}, 5)


def test_a_ledger_restored_into_a_database_of_the_other_kind_is_the_same(
    settings: Settings, tmp_path: Path, target: str
) -> None:
    """The portable form of PostgreSQL's rows restores into SQLite; SQLite's file does under another name."""
    other = settings_of(tmp_path / "new", f"sqlite:///{tmp_path}/other.db")
    back_up(settings, target, "ann")
    restore(other, target, "bob")
    assert rows(other.ledger) == rows(settings.ledger)
    assert rows(other.ledger)["verdicts"][0].created_at == WHEN


@on_sqlite
def test_what_happens_during_a_backup_does_not_break_it(
    settings: Settings,
    elsewhere: Settings,
    ledger: Ledger,
    tmp_path: Path,
    target: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the ledger is copied: a release, a commit of ingest, compaction, a collector."""
    artifacts, store = Artifacts(settings.artifacts), SampleStore(settings.lake)
    whole = backup.write_ledger
    meanwhile: list[Any] = []

    def written(*arguments: Any) -> Any:
        result = whole(*arguments)
        add_adapter(tmp_path, artifacts, ledger, "clip-9")
        put(store, [sample(0, 4)], Position(TOPIC, 0, 5))
        meanwhile.append(Collector(settings, ledger, artifacts).run())
        return result

    whole_files = backup.version_files

    def listed(*arguments: Any) -> Any:
        result = whole_files(*arguments)
        put(store, [sample(0, 5)], Position(TOPIC, 0, 6))
        for _ in range(2):
            Maintainer(settings, ledger, store).run_once()  # keep_seconds is 0: only pins keep old files
        return result

    monkeypatch.setattr(backup, "write_ledger", written)
    monkeypatch.setattr(backup, "version_files", listed)
    report = back_up(settings, target, "ann")
    assert meanwhile == [None], "the collector waits"
    assert report.missing == ()
    restore(elsewhere, target, "bob")
    restored = rows(elsewhere.ledger)
    assert restored["live"].clip == "clip-2"
    kept = Artifacts(elsewhere.artifacts)
    for adapter in restored["adapters"]:
        kept.fetch(f"adapters/{adapter.name}", adapter.digest)
    assert SampleStore(elsewhere.lake).offsets() == {f"{TOPIC}:0": 5, f"{TOPIC}:1": 1}
    assert len(samples(elsewhere)) == 5
    assert store.pins().keys() == {"u-open"}


@on_sqlite
def test_a_file_that_goes_while_it_is_copied_is_named_and_a_killed_backup_lets_its_pin_go(
    settings: Settings, ledger: Ledger, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "_artifact_files", lambda _: {"reports/u-9/report.json": 2})
    with pytest.raises(StoreError, match=r"report\.json was deleted while"):
        back_up(settings, target, "ann")
    store = SampleStore(settings.lake)
    assert store.pins().keys() == {"u-open"}
    store.pin("backup-1", store.version())
    epoch = ledger.acquire_lease(COLLECT_LEASE, "backup", 60)
    assert epoch is not None
    maintainer = Maintainer(settings, ledger, store)
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
def test_a_backup_that_was_interrupted_is_completed(
    settings: Settings, elsewhere: Settings, target: str, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Mortal.left = writes
        patch.setattr(backup, "Place", Mortal)
        back_up(settings, target, "ann")
    with pytest.raises(ConfigError, match="no complete backup"):
        restore(elsewhere, target, "bob")
    report = back_up(settings, target, "ann")
    assert report.files == len(files(Path(target))) - 3, "the ledger, the list of files and the summary"
    restore(elsewhere, target, "bob")
    assert rows(elsewhere.ledger) == rows(settings.ledger)


@on_sqlite
@pytest.mark.parametrize("writes", [0, 3, 8])
def test_a_restore_that_was_interrupted_is_completed(
    settings: Settings, elsewhere: Settings, target: str, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    back_up(settings, target, "ann")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        Mortal.left = writes
        patch.setattr("ops.recovery.restoration.Place", Mortal)
        restore(elsewhere, target, "bob")
    restore(elsewhere, target, "bob")
    assert same(elsewhere, settings)
    with pytest.raises(ConfigError, match="not empty"):
        restore(elsewhere, target, "bob")


def test_nothing_is_restored_over_something_else(settings: Settings, url: str, tmp_path: Path, target: str) -> None:
    make = databases(url)
    back_up(settings, target, "ann")
    with pytest.raises(ConfigError, match="the ledger is not empty"):
        restore(settings_of(tmp_path / "a", settings.ledger), target, "bob")
    for what in ("artifacts", "lake"):
        home = tmp_path / f"with-{what}"
        (home / what).mkdir(parents=True)
        (home / what / "file").write_text("mine")
        with pytest.raises(ConfigError, match=rf"{what} are not empty.*{what}_url"):
            restore(settings_of(home, make(what)), target, "bob")
        assert files(home / what)["file"] == b"mine"
    with pytest.raises(ConfigError, match="has a complete backup"):
        back_up(settings, target, "ann")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="has other files"):
        back_up(settings, str(tmp_path / "other"), "ann")


@on_sqlite
@pytest.mark.parametrize("which", ["adapter.safetensors", "samples.lance/data", "report.json", "ledger", "files.json"])
def test_a_damaged_file_is_found_before_the_ledger_names_it(
    settings: Settings, elsewhere: Settings, target: str, which: str
) -> None:
    back_up(settings, target, "ann")
    name, data = next((name, bytearray(data)) for name, data in files(Path(target)).items() if which in name)
    data[len(data) // 2] ^= 1
    (Path(target) / name).write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        restore(elsewhere, target, "bob")
    assert not rows(elsewhere.ledger)["releases"]


@on_sqlite
def test_a_backup_through_an_object_store_is_restored_into_one(settings: Settings, url: str, tmp_path: Path) -> None:
    target, artifacts = f"memory://backup-{tmp_path.name}", f"memory://artifacts-{tmp_path.name}"
    back_up(settings, target, "ann")
    first = settings_of(tmp_path / "first", databases(url)("first"), artifacts_url=artifacts)
    restore(first, target, "bob")
    again = f"memory://again-{tmp_path.name}"
    Artifacts(artifacts).write_bytes("adapters/clip-half/adapter.safetensors", b"an upload that was interrupted")
    back_up(first, again, "ann")
    second = settings_of(tmp_path / "second", databases(url)("second"))
    restore(second, again, "bob")
    assert files(Path(second.artifacts)) == files(Path(settings.artifacts))
    assert rows(second.ledger) == rows(settings.ledger)


def test_a_backup_of_an_older_migration_is_migrated(settings: Settings, elsewhere: Settings, tmp_path: Path) -> None:
    database = open_database(settings.ledger, migrate=False)
    with database._writing.connect() as connection, connection.begin():
        command.downgrade(alembic_config(connection), "0009")
    file, revision = backup.write_ledger(settings.ledger, tmp_path)
    assert revision == "0009"
    database.close()
    Ledger.open(elsewhere.ledger).close()  # as `ratchet admin migrate` does before an install
    audit = {"actor": "a", "action": "restore", "subject": "s", "detail": {}, "created_at": WHEN}
    load_ledger(file, revision, elsewhere.ledger, audit)
    Ledger.open(settings.ledger).close()
    assert rows(elsewhere.ledger) == rows(settings.ledger)


def test_a_ledger_of_a_newer_version_is_not_backed_up(settings: Settings, ledger: Ledger, target: str) -> None:
    with ledger.database.write() as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(LedgerError, match="9999"):
        back_up(settings, target, "ann")


@on_sqlite
def test_a_data_set_that_changes_faster_than_it_is_copied_is_tried_again(
    settings: Settings, elsewhere: Settings, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = f"{settings.lake}/catalog/clip_1.lance"
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
    back_up(settings, target, "ann")
    assert calls == ["catalog/clip_1.lance"]
    restore(elsewhere, target, "bob")
    assert lance.dataset(f"{elsewhere.lake}/catalog/clip_1.lance").to_table().to_pydict() == {"a": [2]}


def test_the_commands_end_with_json(settings: Settings, elsewhere: Settings, target: str) -> None:
    reports = []
    for name, each in (("backup", settings), ("restore", elsewhere)):
        done = ratchet(each.home, "--set", f"ledger_url={each.ledger}", "admin", name, target)
        assert done.exit_code == 0, done.output
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    assert reports[0] == reports[1] and reports[0]["release"] == 2
