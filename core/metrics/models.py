"""Verbs of the replicas that hold models, and of the catalog."""

from __future__ import annotations

import math

from core.metrics import declared as d


class encoder:
    """Verbs of the encoder replicas."""

    @staticmethod
    def batch(kind: str, items: int, seconds: float) -> None:
        """One forward pass of ``image`` or ``text`` items."""
        d.ENCODER_BATCH.labels(kind).observe(items)
        d.ENCODER_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        """Requests in a batch, and those that wait for a place in one."""
        d.ENCODER_RUNNING.set(running)
        d.ENCODER_QUEUE.set(waiting)


class vlm:
    """Verbs of the VLM replicas."""

    @staticmethod
    def ended(kind: str, outcome: str, seconds: float) -> None:
        """A ``reply``, ``stream`` or ``score`` ended: ``ok``, ``late``, ``ask``, ``adapter``, ``gone`` or ``dead``."""
        d.VLM_REQUESTS.labels(kind, outcome).inc()
        if outcome == "ok":
            d.VLM_SECONDS.labels(kind).observe(seconds)

    @staticmethod
    def tokens(prompt: int, completion: int) -> None:
        """So many tokens were read and written for one request."""
        d.VLM_TOKENS.labels("prompt").inc(prompt)
        d.VLM_TOKENS.labels("completion").inc(completion)

    @staticmethod
    def first_token(seconds: float) -> None:
        """A stream's first token came this long after its request."""
        d.VLM_FIRST.observe(seconds)

    @staticmethod
    def inside(running: int, waiting: int) -> None:
        """Requests in the batch, and those that wait for a place in it."""
        d.VLM_RUNNING.set(running)
        d.VLM_QUEUE.set(waiting)


class catalog:
    """Verbs of the catalog."""

    @staticmethod
    def covered(rows: int, ratio: float) -> None:
        """Rows of the live image space, and the least coverage of any resident space."""
        d.CATALOG_ROWS.set(rows)
        d.CATALOG_COVERAGE.set(ratio)

    @staticmethod
    def searchable(seconds: float) -> None:
        """A sample became searchable this long after it was ingested."""
        d.CATALOG_DELAY.observe(seconds)

    @staticmethod
    def fragments(count: int) -> None:
        """Fragments of the live image space's table."""
        d.CATALOG_FRAGMENTS.set(count)

    @staticmethod
    def backfill(missing: int, rows_per_second: float, seconds_left: float | None) -> None:
        """What the resident spaces lack, how fast it is embedded, and the estimate; None while there is none."""
        d.CATALOG_MISSING.set(missing)
        d.CATALOG_BACKFILL_RATE.set(rows_per_second)
        d.CATALOG_BACKFILL_LEFT.set(math.nan if seconds_left is None else seconds_left)

    @staticmethod
    def indexed(rows: int, used: bool) -> None:
        """Rows of the live image space in its index, and whether searches go through it."""
        d.CATALOG_INDEXED.set(rows)
        d.CATALOG_INDEX_USED.set(int(used))

    @staticmethod
    def index_memory(size: int) -> None:
        """Bytes of the indexes of all image spaces."""
        d.CATALOG_INDEX_BYTES.set(size)

    @staticmethod
    def index_built(seconds: float) -> None:
        """An index was made, or made anew."""
        d.CATALOG_INDEX_SECONDS.observe(seconds)

    @staticmethod
    def recall(ratio: float) -> None:
        """Share of the true ten nearest rows that the index found, whether it is used or not."""
        d.CATALOG_RECALL.set(ratio)


class drift:
    """Verbs of the drift of incoming data."""

    @staticmethod
    def measured(space: str, frechet: float, mean_shift: float) -> None:
        """Distance of the newest embeddings from those before them."""
        d.DRIFT_FRECHET.labels(space).set(frechet)
        d.DRIFT_SHIFT.labels(space).set(mean_shift)
