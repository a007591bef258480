"""Rebuild the committed assets: ``python -m demo.vlm HOME`` (half an hour); ``--scores-only``: just the scores."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from core.progress import progress_log
from demo.vlm.scores import SCORES, score_vlm
from demo.vlm.shipped import ASSETS, MODEL, build_vlm


def main(home: Path, train: bool) -> None:
    base = build_vlm(home, retrain=train)
    if train:
        shutil.rmtree(MODEL, ignore_errors=True)
        shutil.copytree(base.model, MODEL)
        progress_log.info(f"wrote {MODEL}")
    scores = {"base": base.digest, "kinds": score_vlm(base)}
    (ASSETS / SCORES).write_text(json.dumps(scores, indent=1) + "\n")
    progress_log.info(f"wrote {ASSETS / SCORES}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), train="--scores-only" not in sys.argv[2:])
