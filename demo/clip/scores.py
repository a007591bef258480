"""Zero-shot scores of a base on the demo domains, by the gate's scorer, as fractions of 1. Recall is the mean of both
directions on at most 300 test items per domain; domains with classes have an accuracy, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.progress import progress_log
from core.settings.serving import SHIPPED
from demo.clip.shipped import ASSETS, DOMAINS
from demo.data import prepare_domain
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.engines.processor import Precision
from updater.gate.score import Scorer
from updater.gate.suites import Suite

SCORES = "scores.json"
UNSEEN = ("fluent3d", "stamp_photo", "flags", "game_icons", "pixel_mshock", "fashion")
"""Domains that the shipped base was not trained on."""
LIMIT = 300
TEMPLATES = {
    "pixel_ultica": ("{}", "pixel art of {}.", "a game tile of {}."),
    "pixel_mshock": ("{}", "pixel art of {}.", "a game tile of {}."),
    "stamp_photo": ("{}", "a photo of {}.", "a picture of {}."),
    "fashion": ("{}", "a picture of a {}.", "a grey photo of a {}."),
}
"""Domains with classes, and their prompts."""
_NO_RETRIEVAL = ("fashion",)
"""Ten templated texts for thousands of pictures are not a retrieval task."""


def score_base(
    home: Path | str, name: str = SHIPPED, domains: Sequence[str] | None = None, precision: Precision = "float32"
) -> dict[str, dict[str, float]]:
    """Scores by domain: ``recall@1``, ``recall@5``, ``accuracy`` (fractions), ``items``. Takes minutes for all domains.
    Raises :class:`core.errors.BaseModelError` when the base is not registered."""
    base = load_base(home, name)
    engine = ClipEngine(base, precision=precision)
    result: dict[str, dict[str, float]] = {}
    for domain in domains or (*DOMAINS, *UNSEEN):
        folder = prepare_domain(domain, Path(home))
        result[domain] = _score(Scorer(engine), domain, folder)  # a scorer caches vectors, so one per domain
        shown = ", ".join(f"{key} {value:.3g}" for key, value in result[domain].items())
        progress_log.info(f"{domain}: {shown}")
    return result


def committed_scores() -> dict[str, dict[str, float]]:
    value: dict[str, Any] = json.loads((ASSETS / SCORES).read_text())
    scores: dict[str, dict[str, float]] = value["domains"]
    return scores


def _score(scorer: Scorer, domain: str, folder: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    common: dict[str, Any] = {"name": domain, "data": str(folder), "split": "test", "limit": LIMIT}
    if domain not in _NO_RETRIEVAL:
        suite = Suite(task="retrieval", **common)
        ranks = scorer.score(suite, None, label=domain).ranks
        for k in (1, 5):
            scores[f"recall@{k}"] = round(float((ranks < k).mean()), 4)
        scores["items"] = len(ranks)
    if domain in TEMPLATES:
        suite = Suite(task="classification", templates=list(TEMPLATES[domain]), **common)
        outcome = scorer.score(suite, None, label=domain)
        scores["accuracy"] = round(float(outcome.hits.mean()), 4)
        scores["items"] = len(outcome.ranks)
    return scores
