"""The picture of the demo: what a few searches found before and after the update."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ratchet_client import Client

HITS = 6
SIDE = 96  # pixels of a thumbnail
DEPTH = 100  # hits looked through for the right image; deeper counts as one more


@dataclass(frozen=True)
class Hit:
    """One answer of a search."""

    id: str
    text: str
    score: float


@dataclass(frozen=True)
class Search:
    """One query under one release: the first hits, and the rank (from 1) of the image whose caption is the query."""

    query: str
    hits: tuple[Hit, ...]
    rank: int


@dataclass(frozen=True)
class Change:
    """One query before and after the update."""

    before: Search
    after: Search

    @property
    def gain(self) -> float:
        """How much nearer to the top the right image came, on a scale where 1 -> 2 counts as much as 10 -> 20."""
        return self.before.rank / self.after.rank


def search(client: Client, query: str, model: str) -> Search:
    """Search the catalog by text under a resident release (``clip@1``)."""
    hits = [Hit(hit["id"], hit["text"] or "", hit["score"]) for hit in client.search(text=query, k=DEPTH, model=model)]
    rank = next((place for place, hit in enumerate(hits, 1) if _same(hit.text, query)), DEPTH + 1)
    return Search(query, tuple(hits[:HITS]), rank)


def choose(changes: Sequence[Change], better: int, worse: int) -> list[Change]:
    """The queries that gained most and those that lost most, so that the picture tells both sides."""
    ordered = sorted(changes, key=lambda change: change.gain)
    return [*reversed(ordered[-better:]), *reversed(ordered[:worse])]


def draw(client: Client, changes: Sequence[Change], title: str, path: Path) -> Path:
    """Draw searches side by side, the image that carries the very words of the query framed in green."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = len(changes), 2 * HITS + 1
    figure, axes = plt.subplots(rows, columns, figsize=(1.05 * columns, 1.42 * rows + 0.9), squeeze=False)
    for row, change in enumerate(changes):
        axes[row][HITS].axis("off")
        for start, found in ((0, change.before), (HITS + 1, change.after)):
            for column in range(HITS):
                _cell(axes[row][start + column], client, found, column)
            place = f"{found.rank}" if found.rank <= DEPTH else f"beyond {DEPTH}"
            axes[row][start].set_title(f"“{found.query}”  right image at rank {place}", loc="left", fontsize=9, pad=4)
    for x, side in ((0.012, "before: the base"), (0.53, "after: the update")):
        figure.text(x, 0.955, side, fontsize=12, weight="bold", va="top")
    figure.text(0.012, 0.992, title, fontsize=10, va="top")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.03, top=0.87, wspace=0.12, hspace=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _same(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()


def _cell(axis: object, client: Client, found: Search, column: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axis, Axes)
    axis.set_xticks([])
    axis.set_yticks([])
    if column >= len(found.hits):
        axis.axis("off")
        return
    hit = found.hits[column]
    axis.imshow(Image.open(io.BytesIO(client.sample_image(hit.id, size=SIDE))).convert("RGB"))
    right = _same(hit.text, found.query)
    for spine in axis.spines.values():
        spine.set_edgecolor("#1a9641" if right else "#cccccc")
        spine.set_linewidth(3 if right else 0.8)
    axis.set_xlabel(f"{hit.score:.2f}", fontsize=7, labelpad=1)
