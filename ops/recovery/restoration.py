"""Restores a backup into an empty ledger, empty artifacts and an empty lake."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from core.artifacts import Artifacts
from core.digests import digest_bytes
from core.errors import ConfigError
from core.ledger import Ledger
from core.progress import progress_log, track
from core.settings import Settings
from ops.recovery.backup import AT_ONCE, DIRECTORIES, FILES, SUMMARY, File, Report
from ops.recovery.ledger_rows import is_empty, load_ledger
from ops.recovery.place import Place, check, copy, file_digest

T = TypeVar("T")
BEGUN: Final = "restore-begun.json"
"""Next to restored files, with the backup's ID."""


def restore(settings: Settings, url: str, actor: str) -> Report:
    """Restore what :func:`ops.recovery.back_up` wrote to ``url``. An interrupted call may be repeated: the ledger is
    filled last, in one transaction. Raises ConfigError for an incomplete backup or a target that is not empty,
    StoreError for a damaged file, LedgerError for a backup of a later version."""
    source = Place(url)
    try:
        report = Report.parse(source.read(SUMMARY))
    except FileNotFoundError:
        message = f"{source.url} has no complete backup: {SUMMARY} is not there."
        raise ConfigError(message, "Name the folder that `ratchet admin backup` wrote.") from None
    targets = {"artifacts": Place(settings.artifacts), "lake": Place(settings.lake)}
    _claim(settings, targets, report)
    if is_empty(settings.ledger):
        listed = source.read(FILES)
        check(FILES, digest_bytes(listed), report.files_digest)
        files = [File(*values) for values in json.loads(gzip.decompress(listed))]
        _restore_lake(source, [file for file in files if file.name.startswith("lake/")], targets["lake"])
        artifacts = Artifacts(settings.artifacts)
        _restore_artifacts(source, [file for file in files if file.name.startswith("artifacts/")], artifacts)
        _restore_ledger(source, report, settings, actor)
    for target in targets.values():
        target.delete(BEGUN)
    return report


def _claim(settings: Settings, targets: dict[str, Place], report: Report) -> None:
    """Check before writing anything that nothing would be overwritten."""
    begun = {what: _begun(what, target, report) for what, target in targets.items()}
    if not is_empty(settings.ledger) and not (any(begun.values()) and _is_restored(settings, report)):
        raise ConfigError("the ledger is not empty.", "Set ledger_url to a new database.")
    for what, target in targets.items():
        if not begun[what]:
            target.write(BEGUN, json.dumps({"backup": report.id}).encode())


def _begun(what: str, target: Place, report: Report) -> bool:
    """True if an earlier call began here. Raises ConfigError when there is something else."""
    elsewhere = f"Set {what}_url to a new place."
    if target.has(BEGUN):
        if json.loads(target.read(BEGUN)) != {"backup": report.id}:
            raise ConfigError(f"another backup is being restored into {target.url}.", elsewhere)
        return True
    if target.files():
        raise ConfigError(f"the {what} are not empty: {target.url}.", elsewhere)
    return False


def _is_restored(settings: Settings, report: Report) -> bool:
    """True if the ledger was filled from this backup, so that only the marks remain to be removed."""
    with closing(Ledger.open(settings.ledger)) as ledger:
        return bool(ledger.audit_rows(1, subject=f"restore {report.id}"))


def _restore_lake(source: Place, files: list[File], lake: Place) -> None:
    """Copies the manifests of each data set last, so that no incomplete version is visible."""
    present = lake.files()

    def one(file: File) -> None:
        name = file.name.removeprefix("lake/")
        if present.get(name) != file.bytes:  # otherwise an earlier call has written and checked it
            copy(source, file.name, file.bytes, lake, name, file.digest)

    last = {file for file in files if "/_versions/" in file.name or "/_refs/" in file.name}
    _each(one, [file for file in files if file not in last], "restore: lake")
    _each(one, [file for file in files if file in last], "restore: versions")


def _restore_artifacts(source: Place, files: list[File], artifacts: Artifacts) -> None:
    directories: dict[str, list[File]] = defaultdict(list)
    for file in files:
        parts = file.name.split("/")
        if parts[1] in DIRECTORIES and len(parts) > 3:
            directories["/".join(parts[1:3])].append(file)

    def directory(key: str) -> None:
        if artifacts.exists(key):  # complete, and checked by an earlier call
            return
        with tempfile.TemporaryDirectory(prefix="ratchet-restore-") as folder:
            local = Place(folder)
            for file in directories[key]:
                name = file.name.removeprefix(f"artifacts/{key}/")
                copy(source, file.name, file.bytes, local, name, file.digest)
            artifacts.put_directory(Path(folder), key)

    def single(file: File) -> None:
        with _checked(source, file) as path:
            artifacts.write_bytes(file.name.removeprefix("artifacts/"), path.read_bytes())

    in_directories = {file for each in directories.values() for file in each}
    _each(directory, list(directories), "restore: artifacts")
    _each(single, [file for file in files if file not in in_directories], "restore: reports")


def _restore_ledger(source: Place, report: Report, settings: Settings, actor: str) -> None:
    detail = {"from": source.url, "created_at": report.created_at, "release": report.release}
    row = {
        "actor": actor, "action": "restore", "subject": f"restore {report.id}", "detail": detail,
        "created_at": datetime.now(UTC),
    }  # fmt: skip
    with _checked(source, report.ledger) as path:
        rows = load_ledger(path, report.revision, settings.ledger, row)
    progress_log.info(f"restore: the ledger, {rows:,} rows")


@contextmanager
def _checked(source: Place, file: File) -> Iterator[Path]:
    with source.opened(file.name, file.bytes) as path:
        check(file.name, file_digest(path), file.digest)
        yield path


def _each(work: Callable[[T], None], items: list[T], label: str) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in track(pool.map(work, items), label, total=len(items)):
            pass
