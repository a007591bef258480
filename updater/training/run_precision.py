"""The precision of an update, settled when it begins."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from updater.recipes import TrainPrecision
from updater.training.checkpoint import read_json, write_json

NAME = "precision.json"


def run_precision(work_dir: Path, run: str, precision: TrainPrecision) -> TrainPrecision:
    """The precision with which this run began in ``work_dir``; ``precision``, and it is kept, where it begins now.

    An update that is resumed on another machine ends in what it would have ended in on the first, up to rounding.
    """
    path = work_dir / NAME
    known = read_json(path)
    if isinstance(known, dict) and known.get("run") == run and known.get("precision") in get_args(TrainPrecision):
        return known["precision"]  # type: ignore[no-any-return]
    write_json(path, {"run": run, "precision": precision})
    return precision
