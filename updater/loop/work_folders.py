"""Work folders of updates: checkpoints, measured costs, prepared shards. A process that was killed may leave one."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.ledger import Ledger


def work_folders(home: Path) -> list[Path]:
    """Work folders of this machine, by the ids of their updates."""
    return sorted(path for path in (home / "updates").glob("*") if path.is_dir())


def remove_finished(home: Path, ledger: Ledger) -> None:
    """Delete those of updates that are over. Raises LedgerUnavailable."""
    for path in work_folders(home):
        if ledger.is_finished(path.name):
            shutil.rmtree(path, ignore_errors=True)
