"""The Lance table under the sample store: opening it, making it, and finding the positions in it without a scan.

A position is a row in a fragment of its own, written with the columns of a position alone. The manifest tells which
fragments have only those, so finding the positions costs as little at ten million samples as at ten.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import lance
import pyarrow as pa
from lance.file import LanceFileSession
from lance.fragment import write_fragments

from core.dependencies import storage_state
from core.errors import StoreError, StoreFull, StoreUnavailable
from streams.store.rows import POSITION_COLUMNS, SCHEMA, Position

log = logging.getLogger(__name__)
#: Lance's caches of one process. Their defaults are of the size of a server's memory.
METADATA_CACHE_BYTES: Final = 32 << 20
INDEX_CACHE_BYTES: Final = 64 << 20
FORMAT: Final = "3"
MIGRATED: Final = "2"
"""The format before, which lacks the column ``sent_at``: read as it is, and migrated by the first process that writes.
Versions from before that keep it."""
MIGRATION_ATTEMPTS: Final = 30
ROOT: Final = Position("", -1, 0)
"""The position of no partition. Who makes the first position of a partition replaces it, so that two cannot do so at
once; its tally holds what deletions took away."""


class SampleTable:
    """Where the samples are: ``<lake url>/samples.lance``."""

    def __init__(self, lake: str) -> None:
        self.url = f"{lake.rstrip('/')}/samples.lance"
        self._session = lance.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)

    def open(self, version: int | None = None) -> Any | None:
        """A version as a Lance data set; the newest by default, None where there is no table yet.

        Raises:
            StoreUnavailable: it cannot be read now.
            StoreError: the version is not kept any more, or the table is of another Ratchet.
        """
        if version == 0:
            return None
        try:
            dataset = lance.dataset(self.url, version=version, session=self._session)
        except (ValueError, OSError) as error:
            text = str(error).lower()
            if "not found" not in text or "nosuchbucket" in text or "bucket does not exist" in text:
                raise outage(self.url, "read", error) from error
            if version is None:
                return None
            raise StoreError(
                f"the sample store {self.url} has no version {version} (any more).",
                "Old versions are removed unless an update is pinned to them; start again from the latest.",
            ) from error
        if _format(dataset) not in (FORMAT, MIGRATED):
            raise StoreError(
                f"the sample store {self.url} was made by another version of Ratchet.",
                "Use that version, or a newer one (docs/deployer.md, Upgrade).",
            )
        return dataset

    def create(self) -> Any:
        """Make the table where there is none, and migrate one of the format before. Of processes that start at once
        one does it, and the others take it.
        """
        dataset = self.open()
        if dataset is not None:
            return dataset if _format(dataset) == FORMAT else self._migrate(dataset)
        identity = {
            "ratchet.format": FORMAT,
            "ratchet.store": secrets.token_hex(16),
            "ratchet.split_key": secrets.token_hex(32),
        }
        schema = SCHEMA.with_metadata(identity)
        root = pa.Table.from_pylist([ROOT.row()], schema=schema)
        try:
            # Not write_dataset(mode="create"): that one, when it loses the race, overwrites the winner's table. With no
            # retries the commit writes version 1 or fails.
            fragments = write_fragments(root, self.url, schema=schema, mode="create")
            lance.LanceDataset.commit(self.url, lance.LanceOperation.Overwrite(schema, fragments), max_retries=0)
        except OSError as error:
            if self.open() is None:
                raise outage(self.url, "made", error) from error
        return self.open()

    def _migrate(self, dataset: Any) -> Any:
        """Bring a table of the format before up to date: nothing that is stored is written again.

        The column first: a process that dies in between leaves a table that it is added to no second time.

        Raises:
            StoreUnavailable: to be tried again.
        """
        log.warning("the sample store %s is migrated from format %s to %s", self.url, _format(dataset), FORMAT)
        failure: Exception | None = None
        for _ in range(MIGRATION_ATTEMPTS):
            dataset = self.open()
            if _format(dataset) == FORMAT:
                return dataset
            try:
                if "sent_at" in dataset.schema.names:
                    dataset.update_schema_metadata({"ratchet.format": FORMAT})
                else:
                    dataset.add_columns(pa.schema([SCHEMA.field("sent_at")]))
            except (OSError, RuntimeError, ValueError) as error:  # another process may have been faster
                failure = error
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311  (spreads the tries)
        raise outage(self.url, "migrated", failure or RuntimeError("others change it all the time"))

    def identity(self) -> tuple[str, bytes]:
        """Name of this store, and the key of its split, which nobody who publishes can know. Makes the table."""
        metadata = self.create().schema.metadata
        return metadata[b"ratchet.store"].decode(), bytes.fromhex(metadata[b"ratchet.split_key"].decode())

    def discard(self, files: Iterable[str]) -> None:
        """Remove data files that no version of the table has, by their names in its folder of data."""
        session = LanceFileSession(f"{self.url}/data")
        for name in files:
            try:
                session.delete_file(name)
            except (OSError, RuntimeError, ValueError) as error:
                log.warning("%s is left for Lance to clean up: %s", name, error)


def _format(dataset: Any) -> str:
    return str(dict(dataset.schema.metadata or {}).get(b"ratchet.format", b"").decode())


def fences(dataset: Any) -> list[Any]:
    """The fragments that hold positions: those without other columns, and the first, with which the table was made."""
    names = {dataset.lance_schema.field(name).id() for name in POSITION_COLUMNS}
    return [
        fragment
        for fragment in dataset.get_fragments()
        if fragment.fragment_id == 0 or all(set(file.fields) <= names for file in fragment.data_files())
    ]


def positions(dataset: Any) -> Iterator[tuple[int, Position]]:
    """Fragment and position of every partition, :data:`ROOT` among them."""
    fragments = fences(dataset)
    if not fragments:
        return
    with reading(dataset.uri):
        table = dataset.scanner(columns=list(POSITION_COLUMNS), fragments=fragments, with_row_address=True).to_table()
    for row in table.to_pylist():
        yield int(row["_rowaddr"]) >> 32, Position.parse(row)


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Errors of a scan become an outage of the store. Arrow wraps those of Lance's input and output as ArrowInvalid.

    Raises:
        StoreUnavailable
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise outage(url, "read", error) from error


def outage(url: str, doing: str, error: Exception) -> StoreError:
    """A message that helps, for an error of Lance: a full disk is told from a store that is away, or refuses."""
    state, cause = storage_state(error)
    if state == "full":
        return StoreFull(f"the disk of the sample store {url} is full: {cause}.", "Free space; nothing is lost.")
    fix = "Check `lake_url`, its credentials and permissions."
    return StoreUnavailable(f"the sample store {url} cannot be {doing}: {cause}.", fix, state)
