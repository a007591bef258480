"""Draws the rows of the sample store that an update may learn from, as ordered addresses without their contents.
Pending rows (D) come in the order of the setting ``updater.draw``: ``uniform`` by a hash of seed and id, so that the
first m rows are a sample of m; ``newest`` by the time at which they were stored. Earlier rows, including those that an
update passed over, are drawn by the replay reservoir. Some 40 bytes per row are kept."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from core.ledger import UpdateRow
from core.settings.trust import Trust
from core.settings.updates import Draw
from streams.store.rows import ACCEPTED
from streams.store.sample_store import ADDRESS, Having, SampleStore
from updater.recipes import Family, Recipe

WITHOUT = "without"
"""In the cost of an update: sources that it does not learn from, and whose held-out samples do not judge it."""
HAVING: Mapping[Family, Having] = {"clip": "text", "vlm": "question"}
PLACE = ("topic", "partition", "offset")
PARTITIONS = 1 << 32


@dataclass(frozen=True)
class Drawn:
    """Addresses of rows in one version of the store, uint64, each array in draw order."""

    new: np.ndarray
    replay: np.ndarray


def draw_rows(
    store: SampleStore,
    recipe: Recipe,
    version: int,
    data_from: Mapping[str, int],
    seed: int,
    draw: Draw,
    data_to: Mapping[str, int] | None = None,
    trust: Trust | None = None,
    without: Collection[str] = (),
) -> Drawn:
    """Draw from the training split of a version; rows at or after the offsets ``data_from`` are new. Rows at or after
    ``data_to`` are excluded; None excludes none. ``trust``: bounds the shares of sources among the new rows.
    ``without``: sources to leave out."""
    replays = recipe.mixture.replay > 0
    new, old = _Rows(trust), _Rows()
    columns = ["id", *PLACE, "ingested_at", "domain", "concept", "source", "until"]
    columns += ["label"] if recipe.family == "vlm" else []
    for batch in store.addresses(columns, version, "train", HAVING[recipe.family], without=without):
        if data_to is not None:
            batch = batch.filter(pa.array(~_is_new(batch, data_to)))
        fresh = _is_new(batch, data_from)
        new.add(batch, fresh, seed)
        if replays and not fresh.all():
            old.add(batch, ~fresh, seed, recipe.family)
    return Drawn(new.drawn(draw), old.replayed(recipe))


def _is_new(batch: pa.RecordBatch, data_from: Mapping[str, int]) -> np.ndarray:
    """Mask of rows at or after the first new offset of their partition, or accepted since, bool [n]."""
    topics = batch["topic"].dictionary_encode()
    codes, partition = (
        each.to_numpy(zero_copy_only=False).astype(np.int64) for each in (topics.indices, batch["partition"])
    )
    places, which = np.unique(codes * PARTITIONS + partition, return_inverse=True)
    names = topics.dictionary.to_pylist()
    keys = [f"{names[int(place) // PARTITIONS]}:{int(place) % PARTITIONS}" for place in places]
    first = np.array([data_from.get(key, 0) for key in keys], np.int64)
    later: np.ndarray = batch["offset"].to_numpy(zero_copy_only=False) >= first[which]
    accepted: np.ndarray = batch["until"].fill_null(0).to_numpy(zero_copy_only=False) > data_from.get(ACCEPTED, 0)
    new: np.ndarray = later | accepted
    return new


def left_out(update: UpdateRow) -> frozenset[str]:
    """Sources that an update does without."""
    return frozenset(update.cost.get(WITHOUT, ()))


class _Rows:
    def __init__(self, trust: Trust | None = None) -> None:
        self.bounded = {name: each.share for name, each in trust.sources.items() if each.share < 1} if trust else {}
        self.trust = trust
        self.pieces: list[dict[str, np.ndarray]] = []
        self.topics: dict[str, int] = {}
        self.concepts: dict[str, int] = {}

    def add(self, batch: pa.RecordBatch, where: np.ndarray, seed: int, family: Family | None = None) -> None:
        """Add the rows of a batch selected by ``where``; with their concepts if a family is given."""
        rows = batch.filter(pa.array(where))
        columns = {name: rows[name].to_numpy(zero_copy_only=False) for name in (ADDRESS, "partition", "offset")}
        columns["key"] = np.fromiter((draw_key(each, seed) for each in rows["id"].to_pylist()), np.uint64)
        columns["time"] = rows["ingested_at"].cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        columns["topic"] = _codes(rows["topic"].to_pylist(), self.topics)
        if self.trust is not None and self.bounded:
            rules = [self.trust.rule(source or "") for source in rows["source"].to_pylist()]
            known = {name: number for number, name in enumerate(self.bounded)}
            columns["rule"] = np.array([known.get(each[0], -1) if each else -1 for each in rules], np.int64)
        if family is not None:
            columns["concept"] = _codes(_concepts(rows, family), self.concepts)
        self.pieces.append(columns)

    def drawn(self, draw: Draw) -> np.ndarray:
        if not self.pieces:
            return np.empty(0, np.uint64)
        rows = self._by_place()
        if draw == "newest":
            rows = rows[::-1]
            rows = rows[np.argsort(-self._column("time")[rows], kind="stable")]
        else:
            rows = rows[np.argsort(self._column("key")[rows], kind="stable")]
        drawn: np.ndarray = self._column(ADDRESS)[self._within_shares(rows)]
        return drawn

    def _within_shares(self, rows: np.ndarray) -> np.ndarray:
        """Without the last rows of sources that exceed their share of all that is left."""
        keep = np.ones(len(rows), bool)
        rules = self._column("rule")[rows] if self.bounded else np.full(len(rows), -1)
        for number, share in enumerate(self.bounded.values()):
            (own,) = np.nonzero(rules == number)
            most = int(share / (1 - share) * (len(rows) - len(own)))
            keep[own[most:]] = False
        kept: np.ndarray = rows[keep]
        return kept

    def replayed(self, recipe: Recipe) -> np.ndarray:
        if not self.pieces:
            return np.empty(0, np.uint64)
        rows = self._by_place()
        keys, concepts = self._column("key")[rows], self._column("concept")[rows].tolist()
        chosen = reservoir_order(keys, concepts, recipe.replay_limit, recipe.replay_half_life, recipe.replay_balanced)
        replayed: np.ndarray = self._column(ADDRESS)[rows[chosen]]
        return replayed

    def _by_place(self) -> np.ndarray:
        rank = np.empty(len(self.topics), np.int64)
        rank[[self.topics[name] for name in sorted(self.topics)]] = np.arange(len(self.topics))
        order: np.ndarray = np.lexsort((self._column("offset"), self._column("partition"), rank[self._column("topic")]))
        return order

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([piece[name] for piece in self.pieces])


def _codes(names: Iterable[str], known: dict[str, int]) -> np.ndarray:
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def _concepts(rows: pa.RecordBatch, family: Family) -> Iterator[str]:
    columns = [rows[name].to_pylist() for name in ("concept", "domain")]
    kinds = rows["label"].to_pylist() if family == "vlm" else [None] * rows.num_rows
    for concept, domain, kind in zip(*columns, kinds, strict=True):
        yield f"{kind or ''} {concept or domain or ''}"


def reservoir_order(
    keys: np.ndarray, concepts: Sequence[Hashable], capacity: int, half_life: float, balanced: bool = True
) -> np.ndarray:
    """Row numbers of at most ``capacity`` rows in draw order: the first m of them are a reservoir of m.

    Weighted sampling without replacement (Efraimidis and Spirakis, A-Res): each row gets the key u^(1/w), and the
    largest keys are kept. u is a hash of seed and id, so the draw is a pure function of the rows and the seed; w = 1 /
    decayed count of the row's concept (MetaCLIP's balancing for a stream: a row counts half after ``half_life`` further
    rows). ``keys``: :func:`draw_key` of each row, uint64 [n], oldest first. ``balanced``: False ignores the counts.
    """
    counts = decayed_counts(concepts, half_life) if balanced else {}
    weights = np.fromiter((counts.get(concept, 1.0) for concept in concepts), np.float64, len(keys))
    # log(u^(1/w)) = log(u) / w = log(u) x count; log keeps tiny keys apart.
    logarithms = np.log((keys.astype(np.float64) + 0.5) / 2.0**64) * weights
    return np.argsort(-logarithms, kind="stable")[:capacity]


def decayed_counts(concepts: Iterable[Hashable], half_life: float) -> dict[Hashable, float]:
    """Rows of each concept, the newest counting 1 and one ``half_life`` rows older counting 0.5."""
    growth = math.log(2) / half_life
    sums: dict[Hashable, float] = defaultdict(float)
    last: dict[Hashable, int] = {}
    number = -1
    for number, concept in enumerate(concepts):
        passed = number - last.get(concept, number)
        sums[concept] = sums[concept] * math.exp(-growth * passed) + 1.0
        last[concept] = number
    return {concept: count * math.exp(-growth * (number - last[concept])) for concept, count in sums.items()}


def draw_key(name: str, seed: int) -> int:
    """First 64 bits of a hash of seed and id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
