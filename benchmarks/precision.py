"""``ratchet bench precision``: what a precision changes on the gate's suites, compared with float32.

For the settings' CLIP without an adapter, each precision that its device has: the share of first answers to the gate's
suites that are those of float32, the score beside float32's, and the least cosine of a picture's or a text's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.settings import Settings
from demo.data import prepare_domain
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.engines.processor import Precision, processor
from updater.gate.score import Scorer
from updater.gate.suites import Suite, load_suites

Row = dict[str, Any]
EXACT: Final[Precision] = "float32"


def run(settings: Settings, max_items: int = 0) -> Row:
    """``max_items``: of each suite; those of ``gate.max_items`` when 0."""
    base = load_base(settings.home, settings.base.clip)
    suites = load_suites(settings.gate.suites, settings.home, "clip", max_items or settings.gate.max_items)
    for suite in suites if not settings.gate.suites else ():
        prepare_domain(suite.folder.name, settings.home)
    exact = Scorer(ClipEngine(base, precision=EXACT))
    device = exact.engine.device.type
    others = [precision for precision in processor(device).precisions if precision != EXACT]
    rows = []
    for precision in others:
        scorer = Scorer(ClipEngine(base, precision=precision))
        rows += [compare(exact, scorer, suite) for suite in suites]
    agree = {
        precision: float(np.average([row["same"] for row in each], weights=[row["answers"] for row in each]))
        for precision in others
        if (each := [row for row in rows if row["precision"] == precision])
    }
    return {"model": base.name, "same": agree, "suites": rows, "machine": machine()}


def compare(exact: Scorer, scorer: Scorer, suite: Suite) -> Row:
    """One suite's answers and vectors in both precisions."""
    expected, got = exact.score(suite, None), scorer.score(suite, None)
    items = suite.items()
    texts = sorted({item.text for item in items})
    images = (exact.images(items, None) * scorer.images(items, None)).sum(axis=1).min()
    words = (exact.texts(texts, None) * scorer.texts(texts, None)).sum(axis=1).min()
    return {
        "precision": scorer.engine.precision, "suite": suite.name, "answers": got.answers.size,
        "same": float((got.answers == expected.answers).mean()), "score": float(got.hits.mean()),
        "score_float32": float(expected.hits.mean()), "cosine_image": float(images), "cosine_text": float(words),
    }  # fmt: skip


def show(figures: Row) -> None:
    title = f"{figures['model']}: answers to the gate's suites, compared with {EXACT}"
    table = Table("precision", "suite", "answers", "the same", "score", EXACT, "least cosines", title=title)
    for row in figures["suites"]:
        table.add_row(
            row["precision"], row["suite"], str(row["answers"]), f"{row['same']:.2%}", f"{row['score']:.2%}",
            f"{row['score_float32']:.2%}", f"{row['cosine_image']:.5f}, {row['cosine_text']:.5f}",
        )  # fmt: skip
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("precision", __doc__)
    parser.add_argument("--max-items", type=int, default=0, help="items of a suite, at most (gate.max_items)")
    show(run(settings, parser.parse_args(arguments).max_items))
