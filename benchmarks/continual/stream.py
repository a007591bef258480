"""What is learned, in which orders, and what is asked after each update.

Eight updates over unlike domains, none of which the shipped base was trained on; the largest domain is two updates of
different concepts. Each has one suite, over concepts that no domain trains on; that of `fashion` asks for the ten
classes that its update trains on, in other pictures. Held out are the base's own domains, and
two that nobody trains on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from benchmarks.continual.protocol import Protocol
from ops.digests import digest_json
from ops.progress import step
from streams.demo import DOMAINS, prepare_domain
from streams.folders import FolderItem, read_folder
from updater.data.pools import Pair

Role = Literal["adaptation", "held-out"]
Task = Literal["retrieval", "classification"]
CREATURES = frozenset({"creature"})
REFERENCE = ("noto", "openmoji", "openclipart", "pixel_ultica")
"""Domains of the base that methods may hold on to (the fifth, twemoji, draws the same things as noto)."""
ORDERS = 3
RECALL_AT = 5


@dataclass(frozen=True)
class Source:
    """A demo domain, or the part of it with (or without) some labels."""

    name: str
    domain: str
    task: Task = "retrieval"
    only: frozenset[str] = frozenset()
    without: frozenset[str] = frozenset()
    split: str = "test"
    """Of the suite; a domain that nobody trains on may be asked about all of itself."""

    def takes(self, item: FolderItem) -> bool:
        """Whether a row of the domain belongs here."""
        return (not self.only or item.label in self.only) and item.label not in self.without


UPDATES = (
    Source("fluent3d", "fluent3d"),
    Source("game_icons", "game_icons"),
    Source("creatures", "pixel_mshock", only=CREATURES),
    Source("stamp_photo", "stamp_photo"),
    Source("flags", "flags"),
    Source("fluent_mono", "fluent_mono"),
    Source("pixel_things", "pixel_mshock", "classification", without=CREATURES),
    Source("fashion", "fashion", "classification"),
)
HELD_OUT = (
    Source("noto", "noto"),
    Source("openmoji", "openmoji"),
    Source("openclipart", "openclipart"),
    Source("pixel_ultica", "pixel_ultica"),
    Source("pixel_retro", "pixel_retro", "classification"),
    Source("stamp_draw", "stamp_draw", split=""),
)


@dataclass(frozen=True)
class Suite:
    """Held-out items and what is asked about them: recall at 5, or the class among all classes."""

    name: str
    role: Role
    task: Task
    items: tuple[Pair, ...]
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """Everything a chain needs. ``updates`` in the order in which they are listed, each with its suite."""

    updates: dict[str, tuple[Pair, ...]]
    reference: tuple[Pair, ...]
    suites: tuple[Suite, ...]

    @property
    def digest(self) -> str:
        """Over names and texts of everything, 64 hex digits."""
        suites = {suite.name: suite.items for suite in self.suites}
        parts = {**{f"update {name}": pairs for name, pairs in self.updates.items()}, **suites, "": self.reference}
        return digest_json([[name, [[p.id, p.text, p.label] for p in pairs]] for name, pairs in parts.items()])

    def order(self, number: int) -> list[str]:
        """Names of the updates: as listed for 0, shuffled by the number for others."""
        names = list(self.updates)
        if number:
            random.Random(f"order {number}").shuffle(names)  # noqa: S311
        return names


def prepare(home: Path) -> None:
    """Download and draw the domains that are missing. Raises PackageError."""
    for domain in sorted({source.domain for source in (*UPDATES, *HELD_OUT)} | set(REFERENCE)):
        with step(f"data: {domain}"):
            prepare_domain(domain, home)


def load_stream(home: Path, protocol: Protocol) -> Stream:
    """Read what :func:`prepare` made."""

    @cache
    def whole(domain: str) -> list[FolderItem]:
        return [item for item in read_folder(home / "data" / domain) if item.text]

    def rows(domain: str, split: str) -> list[FolderItem]:
        return [item for item in whole(domain) if not split or item.split in ("", split)]

    def chosen(source: Source, split: str, limit: int) -> tuple[Pair, ...]:
        return _drawn([_pair(item) for item in rows(source.domain, split) if source.takes(item)], limit)

    def suite(source: Source, role: Role) -> Suite:
        templates = ("{}", *DOMAINS[source.domain].templates) if source.task == "classification" else ()
        return Suite(source.name, role, source.task, chosen(source, source.split, protocol.items), templates)

    reference = [_pair(item) for domain in REFERENCE for item in rows(domain, "train")]
    return Stream(
        updates={source.name: chosen(source, "train", protocol.new) for source in UPDATES},
        reference=_drawn(reference, protocol.reference),
        suites=(*(suite(s, "adaptation") for s in UPDATES), *(suite(s, "held-out") for s in HELD_OUT)),
    )


def _pair(item: FolderItem) -> Pair:
    """Captions are their first sentence: the long descriptions of game tiles would take half of all the time."""
    return Pair(f"{item.domain}/{item.path.name}", item.text.partition(". ")[0], item.bytes, item.label)


def _drawn(pairs: Sequence[Pair], limit: int) -> tuple[Pair, ...]:
    """At most ``limit``, by hash of the name: the same for every method, order and seed."""
    return tuple(sorted(pairs, key=lambda pair: hashlib.sha256(pair.id.encode()).digest())[:limit])
