"""Rebuild the committed assets: ``python -m updater.base HOME`` trains the projections and scores the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ops.progress import say
from updater.base.scores import SCORES, score_base
from updater.base.shipped import ASSETS, build_base, export_projections


def main(home: Path) -> None:
    """Train in ``home``, write ``assets/projections.safetensors`` and ``assets/scores.json``."""
    base = build_base(home, retrain=True)
    path = export_projections(base)
    scores = {"base": base.digest, "domains": score_base(home)}
    (ASSETS / SCORES).write_text(json.dumps(scores, indent=1) + "\n")
    say(f"wrote {path} and {ASSETS / SCORES}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
