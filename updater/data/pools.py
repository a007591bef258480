"""The examples of an update: three pools, determined by the store's version and a seed. Each pool is in draw order, so
its first m examples are a draw of m: an update visits as many as its budget pays for. The order of visits (views of
images, runs of one domain) is a function of the draw, the recipe and a seed, so that a resumed update visits the same.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from threading import Lock
from typing import Any, overload

import numpy as np

from core.digests import digest12, digest_bytes
from core.errors import ConfigError
from core.progress import progress_log
from core.settings.trust import Trust
from core.settings.updates import Draw
from streams.publish.folders import FolderItem, read_folder
from streams.store.sample_store import SampleStore
from updater.data.draw import draw_rows
from updater.data.mixture import shuffled
from updater.recipes import PARTS, Batches, Family, Part, Recipe, Views

WORDS_ROWS = 1024
IMAGE_ROWS = 48
"""Rows whose images are read at once: at 8 MiB each 384 MiB, for each of two pools."""


@dataclass(frozen=True)
class Pair:
    """An image with its text and optional class label. ``id`` names the content, ``read`` gives the image."""

    id: str
    text: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    label: str = ""
    domain: str = ""
    view: int = 0

    @property
    def content(self) -> str:
        return f"{self.id} {self.view} {self.text}"


@dataclass(frozen=True)
class Question:
    """An image with a question and its answer; other fields as in :class:`Pair`."""

    id: str
    question: str
    answer: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    label: str = ""
    domain: str = ""

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}"

    @property
    def content(self) -> str:
        return f"{self.id} {self.text}"


Example = Pair | Question


@dataclass(frozen=True)
class Pools:
    """New data D, reference pool P, replay buffer B: all pairs for a CLIP, all questions for a VLM."""

    new: Sequence[Example]
    reference: Sequence[Example] = ()
    replay: Sequence[Example] = ()

    def of(self, part: Part) -> Sequence[Example]:
        return {"new": self.new, "reference": self.reference, "replay": self.replay}[part]

    def shuffled(self, seed: int) -> Pools:
        order = random.Random(seed)  # noqa: S311 - nothing is kept secret
        return Pools(*(tuple(order.sample(pool, len(pool))) for pool in map(self.of, PARTS)))

    @property
    def sizes(self) -> dict[Part, int]:
        return {part: len(self.of(part)) for part in PARTS}

    @property
    def examples(self) -> list[Example]:
        return [example for part in PARTS for example in self.of(part)]

    @property
    def parts(self) -> list[Part]:
        return [part for part in PARTS for _ in self.of(part)]

    def rows(self, batch: Sequence[tuple[Part, int]]) -> list[int]:
        """Indices into :attr:`examples` of a batch's (pool, row)."""
        ends = accumulate(self.sizes.values(), initial=0)
        first = dict(zip(PARTS, ends, strict=False))
        return [first[part] + row for part, row in batch]

    @property
    def digest(self) -> str:
        """SHA-256 over the ids, texts and labels of all pools in order, 64 hex digits."""
        return digest_bytes(*(f"{part} {p.id} {p.text} {p.label}".encode() for part in PARTS for p in self.of(part)))


def draw_pools(
    store: SampleStore,
    recipe: Recipe,
    reference: Sequence[Path],
    version: int,
    data_from: Mapping[str, int],
    seed: int,
    draw: Draw = "uniform",
    data_to: Mapping[str, int] | None = None,
    trust: Trust | None = None,
    without: Collection[str] = (),
) -> Pools:
    """Draw the pools of an update: D from ``data_from`` on (up to ``data_to``) in ``version``, B from before it, as
    :func:`updater.data.draw.draw_rows`. Contains only samples that the recipe's family learns from. A pure function of
    its arguments and of the reference folders' contents. Words and images of the store are read when an example is
    accessed."""
    drawn = draw_rows(store, recipe, version, data_from, seed, draw, data_to, trust, without)
    folders = reference if recipe.mixture.reference > 0 else ()
    return Pools(
        new=StoredExamples(store, version, drawn.new, recipe.family),
        reference=_reference(folders, recipe.reference_limit, seed, recipe.family),
        replay=StoredExamples(store, version, drawn.replay, recipe.family),
    )


def _example(name: str, row: Mapping[str, str], read: Callable[[], bytes], family: Family) -> Example:
    label, domain = row["label"] or "", row["domain"] or ""
    if family == "vlm":
        return Question(name, row["question"], row["answer"], read, label, domain)
    return Pair(name, row["text"], read, label, domain)


class StoredExamples(Sequence[Example]):
    """Examples of the sample store in draw order; words and images are read a page at a time."""

    def __init__(self, store: SampleStore, version: int, addresses: np.ndarray, family: Family) -> None:
        self.addresses = addresses
        self.family: Family = family
        self._store, self._version = store, version
        columns = ["question", "answer"] if family == "vlm" else ["text"]
        self._words = _Pages(store, version, addresses, ["id", "label", "domain", *columns], WORDS_ROWS)
        self._images = _Pages(store, version, addresses, ["image"], IMAGE_ROWS)

    def __reduce__(self) -> tuple[type[StoredExamples], tuple[SampleStore, int, np.ndarray, Family]]:
        return StoredExamples, (self._store, self._version, self.addresses, self.family)

    def __len__(self) -> int:
        return len(self.addresses)

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | Sequence[Example]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        place = number % len(self)
        row = self._words.row(place)
        return _example(row["id"], row, lambda: self._images.row(place)["image"], self.family)


class _Pages:
    """Columns of rows of the store, read a page at a time; the last page is kept. Thread-safe. A row that is read out
    of draw order is read alone."""

    def __init__(
        self, store: SampleStore, version: int, addresses: np.ndarray, columns: Sequence[str], size: int
    ) -> None:
        self.store, self.version, self.addresses, self.columns, self.size = store, version, addresses, columns, size
        self._lock = Lock()
        self._page = self._last = -1
        self._rows: list[dict[str, Any]] = []

    def row(self, number: int) -> dict[str, Any]:
        page, place = divmod(number, self.size)
        with self._lock:
            in_turn, self._last = not place or number == self._last + 1, number
            if page != self._page and not in_turn:
                return self.store.rows_at([int(self.addresses[number])], self.columns, self.version)[0]
            if page != self._page:
                self._rows = []  # both at once would be twice the memory
                wanted = self.addresses[page * self.size : (page + 1) * self.size].tolist()
                self._rows, self._page = self.store.rows_at(wanted, self.columns, self.version), page
            return self._rows[place]


def _reference(folders: Sequence[Path], limit: int, seed: int, family: Family) -> tuple[Example, ...]:
    """``limit`` examples of the reference folders' training split, drawn by hash, so that adding a folder keeps most of
    them. Questions are drawn in turn from each of their kinds (labels), so that rare kinds are included."""
    drawn: list[tuple[bytes, FolderItem]] = []
    check_reference(folders)
    for folder in folders:
        for item in read_folder(folder, split="train"):
            words = item.text if family == "clip" else item.question and f"{item.question} {item.answer}"
            if words:
                key = f"{seed} {folder.name} {item.path.name} {words}".encode()
                drawn.append((hashlib.sha256(key).digest(), replace(item, domain=item.domain or folder.name)))
    drawn.sort(key=lambda each: each[0])
    if family == "vlm":
        drawn = _in_turn(drawn)
    if len(drawn) > limit:
        progress_log.info(f"reference pool: {limit} of {len(drawn)} examples")
    return tuple(
        _example(
            f"reference-{key.hex()[:32]}",
            {name: getattr(item, name) for name in ("text", "question", "answer", "label", "domain")},
            item.bytes,
            family,
        )
        for key, item in drawn[:limit]
    )


def check_reference(folders: Sequence[Path]) -> None:
    """Raise ConfigError if a folder of the reference pool does not exist."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"the reference folder {folder} does not exist.", "Correct updater.reference in the settings."
            )


def _in_turn(drawn: Sequence[tuple[bytes, FolderItem]]) -> list[tuple[bytes, FolderItem]]:
    seen: Counter[str] = Counter()
    turns = []
    for key, item in drawn:
        turns.append((seen[item.label], key, item))
        seen[item.label] += 1
    return [(key, item) for _, key, item in sorted(turns, key=lambda each: each[:2])]


def caption_number(caption: str) -> int:
    """Number of a caption (ignoring case and surrounding spaces), the same in every update."""
    return int(digest12(caption.strip().lower().encode()), 16)


def mixed_seed(seed: int, version: int) -> int:
    """Seed for one update: each store version gives other reference pairs and another order."""
    return int(digest12(f"{seed} {version}".encode()), 16) % 2**31


def visits(rows: Sequence[Example], most: int, views: Views, batches: Batches, seed: str) -> tuple[Example, ...]:
    """At most ``most`` visits of a pool: its rows in order, followed by each further view in another order."""
    examples = list(islice(_with_views(rows, views, seed), most))
    if batches.domains == "mixed":
        return tuple(examples)
    return tuple(examples[place] for place in grouped([each.domain for each in examples], batches.group))


def _with_views(rows: Sequence[Example], views: Views, seed: str) -> Iterator[Example]:
    yield from rows
    for view in range(1, views.count):
        for place in shuffled(len(rows), f"{seed} view {view}"):
            row = rows[place]
            yield replace(row, view=view) if isinstance(row, Pair) else row


def grouped(domains: Sequence[str], size: int) -> list[int]:
    """Order of rows in which runs of at most ``size`` have one domain. The rows of a domain keep their order; its last
    run may be shorter. A run is placed at the mean position of its rows, so that any prefix of the new order has about
    the same share of each domain as the old one."""
    own: dict[str, list[int]] = defaultdict(list)
    for place, domain in enumerate(domains):
        own[domain].append(place)
    runs = [places[start : start + size] for places in own.values() for start in range(0, len(places), size)]
    runs.sort(key=lambda run: (sum(run) / len(run), run[0]))
    return [place for run in runs for place in run]


def run_starts(domains: Sequence[str], size: int) -> tuple[int, ...]:
    starts: list[int] = []
    for place, domain in enumerate(domains):
        if not starts or domain != domains[place - 1] or place - starts[-1] == size:
            starts.append(place)
    return tuple(starts)
