"""Small inputs for the gate's tests: generated images, folder datasets, sample rows, made-up outcomes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from updater.gate import sample_suites
from updater.gate.decision import Scores
from updater.gate.score import Outcomes
from updater.gate.suites import MAX_ITEMS, Family, Suite


class TableImages:
    def __init__(self, rows: pa.Table) -> None:
        self._rows = dict(zip(rows["id"].to_pylist(), rows["image"], strict=True))

    def expect(self, ids: Sequence[str]) -> None:
        pass

    def __call__(self, sample: str) -> bytes:
        image: bytes = self._rows[sample].as_py()
        return image


def fresh_suite(rows: pa.Table, domain: str = "", *, family: Family = "clip", limit: int = MAX_ITEMS) -> Suite:
    """One gain suite over rows with their images; ``domain``: only rows of it."""
    images = TableImages(rows)
    by_domain = sample_suites.items_by_domain(rows, family, images)
    items = by_domain.get(domain, []) if domain else [item for own in by_domain.values() for item in own]
    return sample_suites.fresh_suite(items, domain, family, limit, images)


def fresh_suites(rows: pa.Table, **how: Any) -> list[Suite]:
    return sample_suites.fresh_suites(rows, TableImages(rows), **how)


def picture(seed: int, side: int = 32) -> bytes:
    """A PNG of 4 x 4 random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours).resize((side, side), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def folder_dataset(directory: Path, count: int = 40, classes: int = 4, split: str = "") -> Path:
    directory.mkdir(parents=True)
    with (directory / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "text", "label", "concept", "split"])
        for i in range(count):
            (directory / f"{i}.png").write_bytes(picture(i))
            writer.writerow([f"{i}.png", f"thing number {i}", f"kind_{i % classes}", f"concept {i}", split])
    return directory


def sample_rows(count: int, domain: str = "fluent3d", texts: Sequence[str] | None = None) -> pa.Table:
    return pa.table(
        {
            "id": [f"{domain}-{i}" for i in range(count)],
            "image": [picture(1000 + i) for i in range(count)],
            "text": list(texts) if texts else [f"new thing {i}" for i in range(count)],
            "domain": [domain] * count,
            "concept": [""] * count,
        }
    )


def question_rows(count: int, domain: str = "shop", images: int | None = None) -> pa.Table:
    return pa.table(
        {
            "id": [f"{domain}-question-{i}" for i in range(count)],
            "image": [picture(3000 + i % (images or count)) for i in range(count)],
            "text": [""] * count,
            "question": [f"what is number {i}?" for i in range(count)],
            "answer": [f"thing {i % 3}" for i in range(count)],
            "domain": [domain] * count,
            "concept": [""] * count,
        }
    )


def suite_over(hits: np.ndarray, name: str, role: str, task: str, margin: float | None = None) -> Suite:
    """A suite without data; only its name, role and task count."""
    assert hits.ndim == 2
    return Suite.model_validate({"name": name, "role": role, "task": task, "margin": margin})


def outcomes(hits: np.ndarray) -> Outcomes:
    """Outcomes with these hits (shape [n, views])."""
    return Outcomes(
        ids=np.array([f"item {i}" for i in range(len(hits))]),
        ranks=np.where(hits > 0, 0, 99).astype(np.int32),
        answers=np.zeros(hits.shape, dtype=np.int32),
        k=1,
    )


def ranked(ranks: np.ndarray) -> Outcomes:
    """Outcomes with these ranks (shape [n, views]), of which the first five count as found."""
    ids = np.array([f"item {i}" for i in range(len(ranks))])
    return Outcomes(ids=ids, ranks=ranks.astype(np.int32), answers=np.zeros(ranks.shape, dtype=np.int32), k=5)


def changed(hits: np.ndarray, lost: int, gained: int) -> np.ndarray:
    flat = hits.copy().reshape(-1)
    flat[np.flatnonzero(hits.reshape(-1) == 1)[:lost]] = 0
    flat[np.flatnonzero(hits.reshape(-1) == 0)[:gained]] = 1
    return flat.reshape(hits.shape)


def scores(
    name: str,
    before: np.ndarray,
    after: np.ndarray,
    *,
    base: np.ndarray | None = None,
    role: str = "retention",
    margin: float | None = None,
) -> Scores:
    """Three models' made-up answers; the base is the incumbent unless given."""
    task = "classification" if before.shape[1] == 1 else "retrieval"
    suite = suite_over(before, name, role, task, margin)
    first = outcomes(before)
    return Scores(suite, first if base is None else outcomes(base), first, outcomes(after))
