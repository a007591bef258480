"""The picture of the demo: what a few searches found before and after the update."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image

HITS = 6
SIDE = 96  # pixels of a thumbnail


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    id: str
    text: str
    score: float


@dataclass(frozen=True)
class Search:
    """One query and what it found under one release."""

    query: str
    release: int
    hits: tuple[Hit, ...]


def search(url: str, query: str, model: str = "clip", **filters: object) -> Search:
    """Search the catalog by text, under what is live or under a resident release (``clip@1``)."""
    body = {"text": query, "k": HITS, "model": model, **filters}
    response = httpx.post(f"{url}/v1/search", json=body, timeout=30)
    response.raise_for_status()
    hits = tuple(Hit(hit["id"], hit["text"] or "", hit["score"]) for hit in response.json()["data"])
    return Search(query, int(response.headers["x-ratchet-release"]), hits)


def draw(url: str, before: Sequence[Search], after: Sequence[Search], path: Path) -> Path:
    """Draw the searches side by side, the image that carries the very words of the query framed in green."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(before)
    figure, axes = plt.subplots(rows, 2 * HITS + 1, figsize=(1.05 * (2 * HITS + 1), 1.5 * rows + 0.6), squeeze=False)
    for row, (old, new) in enumerate(zip(before, after, strict=True)):
        axes[row][HITS].axis("off")
        for start, found in ((0, old), (HITS + 1, new)):
            for column in range(HITS):
                _cell(axes[row][start + column], url, found, column)
            axes[row][start].set_title(f"“{found.query}”", loc="left", fontsize=9, pad=4)
    for x, found in ((0.03, before[0]), (0.53, after[0])):
        name = "before: the base" if found.release == 1 else f"after: release {found.release}"
        figure.text(x, 0.985, name, fontsize=12, weight="bold", va="top")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _cell(axis: object, url: str, found: Search, column: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    axis.set_xticks([])
    axis.set_yticks([])
    if column >= len(found.hits):
        axis.axis("off")
        return
    hit = found.hits[column]
    data = httpx.get(f"{url}/v1/samples/{hit.id}/image", params={"size": SIDE}, timeout=30)
    data.raise_for_status()
    axis.imshow(Image.open(io.BytesIO(data.content)).convert("RGB"))
    right = hit.text.strip().lower() == found.query.strip().lower()
    for spine in axis.spines.values():
        spine.set_edgecolor("#1a9641" if right else "#cccccc")
        spine.set_linewidth(3 if right else 0.8)
    axis.set_xlabel(f"{hit.score:.2f}", fontsize=7, labelpad=1)
