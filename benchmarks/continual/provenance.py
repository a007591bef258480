"""Machine and versions of an update, stored with its outcome because reports may be made later and elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.machine import machine


def provenance() -> dict[str, str]:
    """Commit (empty outside a repository; a plus marks changes), processor, version of torch, and day."""
    host = machine()
    return {
        "commit": _commit(),
        "cpu": f"{host['cores']} cores of {host['cpu']}",
        "torch": str(host["torch"]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def distinct_values(origins: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    return {key: sorted({each[key] for each in origins}) for key in ("commit", "cpu", "torch", "date")}


@cache
def _commit() -> str:
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": False}
    try:
        return str(subprocess.run(["git", *arguments], **options).stdout).strip()
    except OSError:
        return ""
