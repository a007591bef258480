"""Rebuild the committed assets: ``python -m demo.clip HOME``; with ``--scores-only`` just the scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from core.progress import progress_log
from demo.clip.scores import SCORES, score_base
from demo.clip.shipped import ASSETS, build_base, export_projections


def main(home: Path, train: bool) -> None:
    base = build_base(home, retrain=train)
    if train:
        progress_log.info(f"wrote {export_projections(base)}")
    scores = {"base": base.digest, "domains": score_base(home)}
    (ASSETS / SCORES).write_text(json.dumps(scores, indent=1) + "\n")
    progress_log.info(f"wrote {ASSETS / SCORES}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), train="--scores-only" not in sys.argv[2:])
