"""What an update is trained on: three pools of examples, pinned by the store's version and a seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ops.digests import digest12, digest_bytes
from ops.errors import ConfigError
from ops.progress import say
from streams.folders import FolderItem, read_folder
from streams.store import Having, SampleStore
from updater.mixture import PARTS
from updater.recipes import Family, Part, Recipe
from updater.replay import Candidate, reservoir

READ_ROWS = 256
"""Images read from the store in one scan."""


@dataclass(frozen=True)
class Pair:
    """One image with its text, and a class label if it has one. ``id`` names the content, ``read`` gives the image."""

    id: str
    text: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    label: str = ""


@dataclass(frozen=True)
class Question:
    """One image with a question and its answer; the rest as for a pair."""

    id: str
    question: str
    answer: str
    read: Callable[[], bytes] = field(repr=False, compare=False)
    label: str = ""

    @property
    def text(self) -> str:
        """Both as one line, to tell examples apart."""
        return f"{self.question} {self.answer}"


Example = Pair | Question
HAVING: dict[Family, Having] = {"clip": "text", "vlm": "question"}
"""What a sample must have for a family to learn from it."""


@dataclass(frozen=True)
class Pools:
    """New data D, reference pool P, replay buffer B: all pairs for a CLIP, all questions for a VLM."""

    new: tuple[Example, ...]
    reference: tuple[Example, ...] = ()
    replay: tuple[Example, ...] = ()

    def of(self, part: Part) -> tuple[Example, ...]:
        """One pool by its name."""
        pools: dict[Part, tuple[Example, ...]] = {"new": self.new, "reference": self.reference, "replay": self.replay}
        return pools[part]

    @property
    def sizes(self) -> dict[Part, int]:
        """Examples in each pool."""
        return {part: len(self.of(part)) for part in PARTS}

    @property
    def examples(self) -> list[Example]:
        """All of them, one pool after the other: what a learner prepares."""
        return [example for part in PARTS for example in self.of(part)]

    @property
    def parts(self) -> list[Part]:
        """The pool of each of :attr:`examples`."""
        return [part for part in PARTS for _ in self.of(part)]

    def rows(self, batch: Sequence[tuple[Part, int]]) -> list[int]:
        """Where the (pool, row) of a batch are among :attr:`examples`."""
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
) -> Pools:
    """The pools of an update: D is what lies after ``data_from`` in ``version``, B is drawn from before it.

    Only samples that the recipe's family learns from are in them. A pure function of its arguments and of the
    reference folders' contents.
    """
    columns = ["id", "text", "question", "answer", "domain", "concept", "label"]
    having = HAVING[recipe.family]
    fresh = set(
        store.scan(version=version, split="train", after=data_from, columns=["id"], having=having)["id"].to_pylist()
    )
    rows = store.scan(version=version, split="train", columns=columns, having=having).to_pylist()
    new = [row for row in rows if row["id"] in fresh]
    old = [row for row in rows if row["id"] not in fresh]
    wanted = recipe.mixture.replay > 0
    earlier = [Candidate(row["id"], _concept(row, recipe.family)) for row in old] if wanted else []
    kept = set(reservoir(earlier, recipe.replay_limit, recipe.replay_half_life, seed, recipe.replay_balanced))
    replay = [row for row in old if row["id"] in kept]
    lazy = _LazyImages(store, version, [row["id"] for row in (*new, *replay)])
    folders = reference if recipe.mixture.reference > 0 else ()
    return Pools(
        new=tuple(_example(row["id"], row, lazy.reader(row["id"]), recipe.family) for row in new),
        reference=_reference(folders, recipe.reference_limit, seed, recipe.family),
        replay=tuple(_example(row["id"], row, lazy.reader(row["id"]), recipe.family) for row in replay),
    )


def _example(name: str, row: Mapping[str, str], read: Callable[[], bytes], family: Family) -> Example:
    if family == "vlm":
        return Question(name, row["question"], row["answer"], read, row["label"] or "")
    return Pair(name, row["text"], read, row["label"] or "")


def _concept(row: Mapping[str, str | None], family: Family) -> str:
    """What replay is balanced over; for questions also their kind."""
    kind = f"{row['label'] or ''} " if family == "vlm" else ""
    return f"{kind}{row['concept'] or row['domain'] or ''}"


def _reference(folders: Sequence[Path], limit: int, seed: int, family: Family) -> tuple[Example, ...]:
    """``limit`` examples of the reference folders' training split, drawn by hash: adding a folder keeps most of them.

    Questions are drawn in turn from each of their kinds, which their labels name, so that the rare ones are held too.
    """
    drawn: list[tuple[bytes, FolderItem]] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"the reference folder {folder} does not exist.", "Correct updater.reference in the settings."
            )
        for item in read_folder(folder, split="train"):
            words = item.text if family == "clip" else item.question and f"{item.question} {item.answer}"
            if words:
                key = f"{seed} {folder.name} {item.path.name} {words}".encode()
                drawn.append((hashlib.sha256(key).digest(), item))
    drawn.sort(key=lambda each: each[0])
    if family == "vlm":
        drawn = _in_turn(drawn)
    if len(drawn) > limit:
        say(f"reference pool: {limit} of {len(drawn)} examples")
    return tuple(
        _example(
            f"reference-{key.hex()[:32]}",
            {"text": item.text, "question": item.question, "answer": item.answer, "label": item.label},
            item.bytes,
            family,
        )
        for key, item in drawn[:limit]
    )


def _in_turn(drawn: Sequence[tuple[bytes, FolderItem]]) -> list[tuple[bytes, FolderItem]]:
    """The first of each label, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for key, item in drawn:
        turns.append((seen[item.label], key, item))
        seen[item.label] += 1
    return [(key, item) for _, key, item in sorted(turns, key=lambda each: each[:2])]


class _LazyImages:
    """Reads encoded images of the store in the order in which they will be asked for, some rows at a time."""

    def __init__(self, store: SampleStore, version: int, ids: Sequence[str]) -> None:
        self.store = store
        self.version = version
        self.ids = list(ids)
        self.place = {name: number for number, name in enumerate(self.ids)}
        self.held: dict[str, bytes] = {}

    def reader(self, name: str) -> Callable[[], bytes]:
        """A function that gives the image of one row."""
        return lambda: self._read(name)

    def _read(self, name: str) -> bytes:
        if name not in self.held:
            start = self.place[name] // READ_ROWS * READ_ROWS
            rows = self.store.scan(
                version=self.version, columns=["id", "image"], ids=self.ids[start : start + READ_ROWS]
            )
            self.held = dict(zip(rows["id"].to_pylist(), rows["image"].to_pylist(), strict=True))
        return self.held[name]


def caption_number(caption: str) -> int:
    """A number for a caption (case and surrounding spaces do not count), the same in every update."""
    return int(digest12(caption.strip().lower().encode()), 16)


def mixed_seed(seed: int, version: int) -> int:
    """A seed for one update: another store version draws other reference pairs and another order."""
    return int(digest12(f"{seed} {version}".encode()), 16) % 2**31
