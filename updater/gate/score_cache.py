"""Scores kept on disk: one small file for what one model answered to one suite."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from core.files import replacing

KEEP_FILES = 400
"""Score files kept in a folder; the oldest go first (each about 10 KB)."""


def store_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays atomically; then drop the oldest files beyond the bound."""
    with replacing(path, durable=False) as staging:
        np.savez_compressed(staging, **cast(dict[str, Any], arrays))
    by_age = sorted(path.parent.glob("*.npz"), key=_age, reverse=True)
    for old in by_age[KEEP_FILES:]:
        old.unlink(missing_ok=True)


def load_arrays(path: Path, names: Sequence[str]) -> list[NDArray[Any]] | None:
    """The arrays of these names, or None if there is no file or it is damaged (it is then written anew)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in names]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    with contextlib.suppress(OSError):
        path.touch()  # the oldest unused go first
    return arrays


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process dropped it
        return 0.0
