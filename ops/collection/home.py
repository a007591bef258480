"""What may go of the folder of this machine: work folders of updates that are over, and caches that nobody uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from core.artifacts.folder import file_size
from core.ledger import Ledger
from ops.collection.plan import Item
from serving.engines.clip_base import names_by_digest
from updater.service.process import work_folders

DAY = 86_400.0


def home_items(home: Path, ledger: Ledger, keep_days: float) -> list[Item]:
    """Items with paths relative to ``home`` as their names. All of them can be made again; files whose times are in the
    future stay.
    """
    return [*_work_folders(home, ledger), *_scores(home, keep_days), *_engines(home, keep_days)]


def _work_folders(home: Path, ledger: Ledger) -> Iterator[Item]:
    for path in work_folders(home):
        over = ledger.is_finished(path.name)
        reason = "its update is over" if over else "its update goes on from it, or is not known"
        size = sum(file_size(each) for each in path.rglob("*"))
        yield Item("work folder", path.relative_to(home).as_posix(), size, over, reason)


def _scores(home: Path, keep_days: float) -> Iterator[Item]:
    for path in sorted((home / "cache" / "gate").rglob("*.npz")):
        age = _days_unused(path)
        goes, reason = age >= keep_days, f"not used for {age:.0f} days"
        yield Item("score cache", path.relative_to(home).as_posix(), file_size(path), goes, reason)


def _engines(home: Path, keep_days: float) -> Iterator[Item]:
    """Graphs and measurements of bases: their names begin with 12 digits of the base's digest."""
    digests = {digest[:12] for digest in names_by_digest(home)}
    for path in sorted((home / "engines").glob("[0-9a-f]" * 12 + "*")):
        age, known = _days_unused(path), path.name[:12] in digests
        reason = "its base is registered" if known else f"its base is not registered, not used for {age:.0f} days"
        size = sum(file_size(each) for each in (path, *path.rglob("*")))
        yield Item("engine cache", path.relative_to(home).as_posix(), size, not known and age >= keep_days, reason)


def _days_unused(path: Path) -> float:
    try:
        return (time.time() - path.stat().st_mtime) / DAY
    except FileNotFoundError:
        return 0.0
