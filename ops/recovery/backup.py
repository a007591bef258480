"""Writes a backup of a running installation. A data set of the lake (Lance) has immutable files and a manifest per
version; unless a version is pinned, another process may clean up its files during the copy."""

from __future__ import annotations

import gzip
import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import lance

from core.artifacts.folder import MARKER
from core.digests import digest_bytes
from core.errors import ConfigError, LeaseLost, LedgerError, StoreUnavailable
from core.ledger import Ledger
from core.ledger.collection import COLLECT_LEASE
from core.ledger.leases import leased
from core.progress import progress_log, track
from core.settings import Settings
from ops.recovery.ledger_rows import write_ledger
from ops.recovery.place import Place, copy, file_digest
from streams.store.sample_store import BACKUP_PIN, SampleStore

FORMAT: Final = 1
SUMMARY: Final = "backup.json"
"""Written last: marks a backup as complete."""
FILES: Final = "files.json.gz"
BEGUN: Final = "backup-begun.json"
"""Present in an incomplete backup."""
LEASE_SECONDS: Final = 300.0
AT_ONCE: Final = 4
TRIES: Final = 3
DIRECTORIES: Final = ("adapters", "memories", "bases")
SAMPLES: Final = "samples.lance"
LAST_VERSION: Final = (1 << 64) - 1
"""Manifests are named by their distance to it, so that listings have the newest first."""


@dataclass(frozen=True)
class File:
    """A file of a backup; its name starts with ``artifacts/`` or ``lake/``."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Report:
    id: str
    created_at: str
    release: int
    store_version: int
    revision: str
    """The ledger's migration."""
    ledger: File
    files: int
    size: int
    files_digest: str
    """SHA-256 of the list of files."""
    missing: tuple[str, ...]
    """Adapters that the ledger names but the artifacts lacked already."""
    format: int = FORMAT

    @classmethod
    def parse(cls, data: bytes) -> Report:
        """Parse a summary. Raises ConfigError when this version cannot read it."""
        try:
            values = json.loads(data)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']}, not {FORMAT}")
            return cls(**values | {"ledger": File(**values["ledger"]), "missing": tuple(values["missing"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"this version cannot read the backup: {error}.", "Name another one.") from None


def back_up(settings: Settings, url: str, actor: str) -> Report:
    """Copy ledger, artifacts and lake to a folder or object store. An interrupted call may be repeated. ``url``: an
    empty place, or a backup that was begun, else ConfigError. Raises LedgerError, StoreError when a store is
    unavailable, or the collector or another backup is running."""
    target = Place(url)
    _claim(target)
    with closing(Ledger.open(settings.ledger)) as ledger, leased(ledger, COLLECT_LEASE, LEASE_SECONDS) as epoch:
        if epoch is None:
            raise LedgerError("the garbage collector, or another backup, is at work.", "Try again when it has ended.")
        with tempfile.TemporaryDirectory() as folder:
            report, files = _copy_all(settings, ledger, target, Path(folder))
        if not ledger.renew_lease(COLLECT_LEASE, epoch, LEASE_SECONDS):
            raise LeaseLost("the backup took a pause so long that files may have been collected.", "Repeat it.")
        target.write(FILES, files)
        target.write(SUMMARY, json.dumps(asdict(report), indent=2).encode())
        target.delete(BEGUN)
        ledger.audit(actor, "back up", f"backup {report.id}", {"to": url, "bytes": report.size})
        return report


def _claim(target: Place) -> None:
    if target.has(SUMMARY):
        raise ConfigError(f"{target.url} has a complete backup.", "Name a new folder, with the date for instance.")
    if not target.has(BEGUN):
        if target.files():
            raise ConfigError(f"{target.url} has other files.", "Name a new folder.")
        target.write(BEGUN, json.dumps({"format": FORMAT}).encode())


def _copy_all(settings: Settings, ledger: Ledger, target: Place, folder: Path) -> tuple[Report, bytes]:
    begun, name = datetime.now(UTC), uuid.uuid4().hex[:12]
    live = ledger.live()
    named = {use.name for use in ledger.adapter_uses() if use.collected_at is None}
    path, revision = write_ledger(settings.ledger, folder)
    target.put(path, path.name)
    rows = File(path.name, path.stat().st_size, file_digest(path))
    progress_log.info(f"backup: the ledger, {rows.bytes:,} bytes")
    with _pinned(SampleStore(settings.lake), name) as version:
        artifacts, lake = Place(settings.artifacts), Place(settings.lake)
        files = _copy_files(artifacts, _artifact_files(artifacts), target, "artifacts")
        for dataset, versions in _datasets(lake, version).items():
            files += _copy_dataset(lake, dataset, versions, target)
    there = {file.name.split("/")[2] for file in files if file.name.startswith("artifacts/adapters/")}
    missing = tuple(sorted(named - there))
    _warn(settings, files, missing)
    listed = gzip.compress(json.dumps([[file.name, file.bytes, file.digest] for file in files]).encode(), 3, mtime=0)
    total = rows.bytes + sum(file.bytes for file in files)
    report = Report(
        name, begun.isoformat(timespec="seconds"), live.number if live else 0, version, revision, rows, len(files),
        total, digest_bytes(listed), missing,
    )  # fmt: skip
    return report, listed


@contextmanager
def _pinned(store: SampleStore, name: str) -> Iterator[int]:
    """Pin the newest version of the sample store, so that maintenance keeps it; 0 if there is none."""
    version, pin = store.version(), f"{BACKUP_PIN}{name}"
    store.pin(pin, version)
    try:
        yield version
    finally:
        store.unpin(pin)


def _artifact_files(artifacts: Place) -> dict[str, int]:
    """All artifact files except incomplete directories, and manifests, which a restore writes again."""
    files = artifacts.files()
    complete = {name.removesuffix(f"/{MARKER}") for name in files if name.endswith(f"/{MARKER}")}

    def belongs(name: str) -> bool:
        parts = name.split("/")
        if parts[-1] == MARKER or (len(parts) < 2 and parts[0].startswith(".")):
            return False
        return artifacts.local is not None or parts[0] not in DIRECTORIES or "/".join(parts[:2]) in complete

    return {name: size for name, size in files.items() if belongs(name)}


def _datasets(lake: Place, version: int) -> dict[str, dict[int, list[str]]]:
    """The versions to copy of each data set, with the pins to keep."""
    folders = {name.partition("/_versions/")[0] for name in lake.files() if ".lance/_versions/" in name}
    wanted: dict[str, dict[int, list[str]]] = {folder: {} for folder in sorted(folders)}
    if version:
        pins = SampleStore(lake.url).pins()
        pins_of = {each: sorted(pin for pin, at in pins.items() if at == each) for each in {version, *pins.values()}}
        wanted[SAMPLES] = {
            each: [pin for pin in names if not pin.startswith(BACKUP_PIN)]
            for each, names in pins_of.items()
            if each <= version
        }
    return wanted


def version_files(lake: Place, name: str, versions: dict[int, list[str]]) -> dict[str, int]:
    """Size of each file of some versions of a data set, by name in the lake, manifests last. ``versions``: each with
    its pins. Raises StoreUnavailable when a version is no longer complete, or the lake is unavailable."""
    listed = lake.files(name)
    inside = [path.removeprefix(f"{name}/") for path in listed]
    wanted: list[str] = []
    manifests: list[str] = []
    for version, pins in versions.items():
        folders = [f"_transactions/{version - 1}-"]
        try:
            dataset = lance.dataset(f"{lake.url.rstrip('/')}/{name}", version=version)
            for fragment in dataset.get_fragments():
                wanted += [f"data/{file.path}" for file in fragment.data_files()]
                wanted += filter(None, [fragment.deletion_file()])
            folders += [f"_indices/{each.uuid}/" for index in dataset.describe_indices() for each in index.segments]
        except (ValueError, OSError) as error:
            raise StoreUnavailable(f"{name} cannot be read now: {error}", "Try again.") from error
        wanted += [path for path in inside if path.startswith(tuple(folders))]
        by_distance, by_number = (f"_versions/{n}.manifest" for n in (f"{LAST_VERSION - version:020}", version))
        manifests.append(by_number if by_number in inside else by_distance)
        manifests += [f"_refs/tags/{pin}.json" for pin in pins]
    paths = [f"{name}/{path}" for path in dict.fromkeys([*wanted, *manifests])]
    missing = [path for path in paths if path not in listed]
    if missing:
        raise StoreUnavailable(f"{missing[0]} was cleaned up meanwhile.", "Try again.")
    return {path: listed[path] for path in paths}


def _copy_dataset(lake: Place, name: str, versions: dict[int, list[str]], target: Place) -> list[File]:
    """Copy a data set. Unpinned files may be cleaned up meanwhile: then the next version is tried."""
    for tries_left in reversed(range(TRIES)):
        try:
            chosen = versions or {int(lance.dataset(f"{lake.url.rstrip('/')}/{name}").version): []}
            return _copy_files(lake, version_files(lake, name, chosen), target, "lake")
        except StoreUnavailable:
            if not tries_left:
                raise
    raise AssertionError  # unreachable


def _copy_files(source: Place, files: Mapping[str, int], target: Place, folder: str) -> list[File]:
    present = target.files(folder)

    def one(item: tuple[str, int]) -> File:
        name, size = item
        as_name = f"{folder}/{name}"
        if present.get(as_name) == size and _never_changes(as_name):
            with target.opened(as_name, size) as path:
                return File(as_name, size, file_digest(path))
        try:
            return File(as_name, *copy(source, name, size, target, as_name))
        except FileNotFoundError:
            raise StoreUnavailable(f"{name} was deleted while it was copied.", "Repeat the command.") from None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(track(pool.map(one, files.items()), f"backup: {folder}", total=len(files)))


def _never_changes(name: str) -> bool:
    parts = name.split("/")
    return parts[1] in DIRECTORIES if parts[0] == "artifacts" else "_refs" not in parts


def _warn(settings: Settings, files: list[File], missing: tuple[str, ...]) -> None:
    if missing:
        progress_log.info(
            f"backup: the ledger names {len(missing)} adapters that the artifacts lack: {', '.join(missing[:10])}"
        )
    pushed = {file.name.split("/")[2] for file in files if file.name.startswith("artifacts/bases/")}
    for name in sorted({settings.base.clip, settings.base.vlm} - {"", *pushed}):
        progress_log.info(
            f"backup: base {name!r} is in neither the artifacts nor this backup: `ratchet base push {name}` first"
        )
