"""What the worker needs of a database, :class:`IndexStore`, and how one is opened: by the scheme of its URL,
``postgresql`` and ``qdrant`` here, others by entry points of the group ``ratchet.indexes``. Test your own with
:mod:`serving.indexes.contract`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Final, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from core.ledger.rows import IndexRow

Vector = npt.NDArray[np.float32]
STORES: Final = {"postgresql": "serving.indexes.pgvector:PgvectorStore", "qdrant": "serving.indexes.qdrant:QdrantStore"}
RETRY_SECONDS: Final = 60.0
"""Until a row whose image could not be fetched is pending again."""


@dataclass(frozen=True, slots=True)
class PendingRow:
    id: str
    image: str | bytes
    """A URI, or the image itself."""
    version: str
    """Equal as long as the image is: writes compare it."""


@dataclass(frozen=True, slots=True)
class Skip:
    """In place of a vector: why an image cannot be embedded. ``transient``: try again after RETRY_SECONDS."""

    reason: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    rows: int
    """With a vector in the space."""
    total: int
    """With an image."""
    skipped: int
    transient: int
    """Of the skipped ones."""


class IndexStore(Protocol):
    """Vectors by image space next to a user's rows. Thread safe; each call may be repeated, and may follow one that
    died anywhere. Raises StoreUnavailable, without any password, while the database is away.

    A row with an image is *pending* in a space until it has a vector there, or is skipped. When its image changes, it
    is pending in every space.
    """

    def open(self, space: str, dim: int) -> None:
        """Make room for the vectors of a space."""

    def pending(self, space: str, limit: int, after: str | None = None) -> Sequence[PendingRow]:
        """The next pending rows behind the ID ``after``, by ID; at most ``limit``."""

    def write(self, space: str, rows: Sequence[tuple[PendingRow, Vector | Skip]]) -> int:
        """Store vectors of rows whose images are still the same; the others stay pending. Returns how many it stored or
        skipped."""

    def counts(self, space: str) -> Counts:
        """Count rows, and remove vectors of rows that were deleted."""

    def build(self, space: str) -> None:
        """Make the index for approximate search."""

    def sample(self, space: str, count: int) -> Sequence[Vector]:
        """Some of the stored vectors."""

    def search(self, space: str, vector: Vector, count: int, exact: bool) -> Sequence[float]:
        """Cosines of the nearest rows, best first; approximate ones as a client gets them."""

    def point(self, space: str) -> None:
        """Name this space for clients from now on, in one step."""

    def drop(self, space: str) -> None:
        """Remove the vectors of a space, and with the last one all that was added to the user's rows."""

    def close(self) -> None: ...


def open_store(index: IndexRow) -> IndexStore:
    """Connect. Raises ConfigError for an unknown scheme, a password in the URL, or a table without these fields;
    StoreUnavailable if the database does not answer."""
    url = urlsplit(index.url)
    if url.password is not None or {"password", "api_key", "sslpassword"} & {*parse_qs(url.query)}:
        raise ConfigError(
            "the URL of an index must not have a password: it is kept in the ledger and shown.",
            "Set PGPASSFILE or PGPASSWORD for PostgreSQL, RATCHET_QDRANT_API_KEY for Qdrant, where this command runs.",
        )
    others = {point.name: point.value for point in entry_points(group="ratchet.indexes")}
    known = STORES | others
    if url.scheme not in known:
        raise ConfigError(f"{url.scheme}:// is no index.", f"Use one of {', '.join(f'{name}://' for name in known)}.")
    module, _, name = known[url.scheme].partition(":")
    store: IndexStore = getattr(import_module(module), name)(index)
    return store
