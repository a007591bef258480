"""The measurements: cells of kind, inputs of a request and concurrency, in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from serving.messages import IMAGE_COST, TEXT_COST, Modality

KINDS: Final[tuple[Modality, ...]] = ("image", "text")
CONCURRENCIES: Final = (1, 8, 32, 128)
ITEMS: Final = (1, 16)
MOST_IMAGES: Final = 512
"""Images that all requests of a cell have in flight together. Two cores without bfloat16 take 25 s for them; 128
requests of 16 would take four times as long, beyond any deadline, and show nothing that 32 of 16 do not."""
TEXTS_PER_IMAGE: Final = IMAGE_COST // TEXT_COST
"""A batch of the server holds this many more texts than images."""


@dataclass(frozen=True, order=True)
class Cell:
    """A closed loop of ``concurrency`` clients, each with ``items`` inputs in a request."""

    kind: Modality
    items: int
    concurrency: int

    def batch(self, max_batch: int) -> int:
        """Inputs of the batches for the model alone: as many as a server could collect. ``max_batch``: images of one
        forward pass, at most.
        """
        most = max_batch * (TEXTS_PER_IMAGE if self.kind == "text" else 1)
        return min(self.items * self.concurrency, max(most, self.items))

    def __str__(self) -> str:
        return f"{self.kind} x{self.items} c{self.concurrency}"


@dataclass(frozen=True)
class Grid:
    """Cells, and how they are measured."""

    cells: tuple[Cell, ...]
    rounds: int
    seconds: float
    """Of one turn of one side in one cell; requests under way at its end are waited for, and count with their time."""

    def turns(self, sides: Sequence[str]) -> Iterator[tuple[Cell, str]]:
        """Every cell and side, once a round; the order of the sides is reversed in every second round."""
        for number in range(self.rounds):
            for cell in self.cells:
                for side in sides if number % 2 == 0 else reversed(sides):
                    yield cell, side


def cells(
    kinds: Sequence[Modality] = KINDS, items: Sequence[int] = ITEMS, concurrencies: Sequence[int] = CONCURRENCIES
) -> tuple[Cell, ...]:
    """All combinations except those with more than :data:`MOST_IMAGES` images in flight."""
    return tuple(
        Cell(kind, count, level)
        for kind in kinds
        for count in items
        for level in concurrencies
        if kind != "image" or count * level <= MOST_IMAGES
    )
