"""Training data and suites of the CLIP stream.

Ten updates over dissimilar domains, none of which the shipped base was trained on, each with its own suite. Domains
that are never trained on are held out: two of the reference pool's, and four that it does not contain.

The concepts of a retrieval suite occur in no update and in no reference pair, whatever the style. Two classification
suites (`fashion`, `digits`) ask for classes that their updates train on, in other pictures; three classes of each are
in no update, and have suites of their own. No picture of a suite looks like a training picture
(:mod:`streams.ingest.perceptual_hash`); those left out for that are counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar
from typing import Protocol as Interface

from benchmarks.continual.looks import left_out
from benchmarks.continual.noise import with_noise
from benchmarks.continual.protocol import Protocol
from core.digests import digest_json, share_of
from core.progress import step
from demo.data import DOMAINS, prepare_domain
from streams.publish.folders import FolderItem, read_folder
from updater.data.pools import Pair


class HasId(Interface):
    @property
    def id(self) -> str:
        pass


Named = TypeVar("Named", bound=HasId)
Role = Literal["adaptation", "unseen", "held-out"]
"""*unseen*: of classes that no update trains on, of a domain that one does."""
Task = Literal["retrieval", "classification"]
REFERENCE = ("noto", "pixel_ultica")
"""Domains of the base that methods may rehearse: the default of an installation."""
RECALL_AT = 5
CAPTION_CHARS = 96
"""Characters of a training caption: a name and the beginning of its description, so that captions have parts."""
TUNING, TUNING_SHARE = "tuning", 0.12
"""Share of what no suite asks for that rates and weights are chosen by, and that no update trains on."""
LEAST_TUNING = 30
"""Items of a tuning suite; a domain with fewer has none."""
UNSEEN_CLASSES = 3
"""Classes of a domain with shared classes that are left out of its update, and asked for in a suite of their own."""


@dataclass(frozen=True)
class Source:
    """A demo domain in the stream, or held out of it."""

    name: str
    domain: str
    task: Task = "retrieval"
    wider: float = 0.0
    """Share of its concepts that its suite asks for, in addition to those of its test split, if that has few
    pictures."""
    shared: bool = False
    """True if its classes, but :data:`UNSEEN_CLASSES` of them, are in training and in the suite."""
    named: bool = False
    """True if its labels, or its texts if it has none, are in the label set of all domains."""


UPDATES = (
    Source("fluent3d", "fluent3d"),
    Source("game_icons", "game_icons"),
    Source("pixel_mshock", "pixel_mshock", "classification", named=True),
    Source("stamp_photo", "stamp_photo", wider=0.35, named=True),
    Source("fluent_mono", "fluent_mono", wider=0.1),
    Source("pixel_retro", "pixel_retro"),
    Source("fashion", "fashion", "classification", shared=True, named=True),
    Source("digits", "digits", "classification", shared=True, named=True),
    Source("tabler", "tabler"),
    Source("logos", "logos"),
)
HELD_OUT = (
    Source("noto", "noto"),
    Source("pixel_ultica", "pixel_ultica", "classification", named=True),
    Source("openclipart", "openclipart"),
    Source("openmoji", "openmoji"),
    Source("twemoji", "twemoji"),
    Source("flags", "flags", wider=1.0, named=True),
)
ALL = (*UPDATES, *HELD_OUT)
SEEN_CLASSES = tuple(source.name for source in UPDATES if source.shared)
"""Suites that ask for classes which their updates train on."""


@dataclass(frozen=True)
class Suite:
    """Held-out items and the task: recall at 5, or the class among all classes."""

    name: str
    role: Role
    task: Task
    items: tuple[Pair, ...]
    templates: tuple[str, ...] = ()
    outside: bool = False
    """Of a domain that the reference pool does not contain."""
    named: bool = False
    """Its items are also asked for among the names of all domains."""
    classes: tuple[str, ...] = ()
    """All answers, in a classification; by default its items' labels."""


@dataclass(frozen=True)
class Stream:
    """Everything a chain needs. ``updates`` in the order in which they are listed, each with its suite."""

    updates: dict[str, tuple[Pair, ...]]
    reference: tuple[Pair, ...]
    suites: tuple[Suite, ...]
    tuning_updates: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    """Other pairs of the same domains, on which methods are tuned; of a small domain, as many as there are."""
    tuning: tuple[Suite, ...] = ()
    """Items of concepts (of `fashion` and `digits`: of pictures) that are in no suite and no update, by which a
    method's rate and weight are chosen."""
    alike: dict[str, int] = field(default_factory=dict)
    """By suite: pictures that were left out because they look like a training picture."""

    def for_tuning(self) -> Stream:
        return replace(self, updates=self.tuning_updates, suites=self.tuning)

    @property
    def digest(self) -> str:
        """Over names and texts of everything, 64 hex digits."""
        suites = {suite.name: suite.items for suite in self.suites}
        parts = {**{f"update {name}": pairs for name, pairs in self.updates.items()}, **suites, "": self.reference}
        return digest_json([[name, [[p.id, p.text, p.label] for p in pairs]] for name, pairs in parts.items()])


def prepare(home: Path) -> None:
    """Download and draw the domains that are missing. Raises PackageError."""
    for domain in sorted({source.domain for source in (*UPDATES, *HELD_OUT)}):
        with step(f"data: {domain}"):
            prepare_domain(domain, home)


def load_stream(home: Path, protocol: Protocol) -> Stream:
    """Read what :func:`prepare` made."""

    @cache
    def rows(domain: str) -> list[FolderItem]:
        return [item for item in read_folder(home / "data" / domain) if item.text]

    of_suite = {source.name: [item for item in rows(source.domain) if _in_suite(source, item)] for source in ALL}
    concepts = {item.concept for source in ALL if not source.shared for item in of_suite[source.name]}
    unseen = {source.name: unseen_classes(of_suite[source.name]) if source.shared else frozenset() for source in ALL}

    def rest(source: Source, tuning: bool) -> list[FolderItem]:
        """Pictures that no suite asks for: the part for tuning, or the part for training."""
        return [
            item
            for item in rows(source.domain)
            if not _in_suite(source, item)
            and (source.shared or item.concept not in concepts)
            and item.label not in unseen[source.name]
            and _tunes(source, item) == tuning
        ]

    drawn = {s.name: by_hash(map(_pair, rest(s, tuning=False)), 2 * protocol.new) for s in UPDATES}
    clean = {name: pairs[: protocol.new] for name, pairs in drawn.items()}
    updates = {name: with_noise(pairs, protocol.swapped, protocol.hostile) for name, pairs in clean.items()}
    reference = by_hash(
        (_pair(item) for source in HELD_OUT if source.domain in REFERENCE for item in rest(source, tuning=False)),
        protocol.reference,
    )
    candidates = {s.name: [_item(s, item) for item in of_suite[s.name]] for s in ALL}
    candidates |= {f"{TUNING} {s.name}": [_item(s, item) for item in rest(s, tuning=True)] for s in ALL}
    taught = [pair for pairs in (*drawn.values(), reference) for pair in pairs]
    alike = left_out(home / "bench" / "continual" / "looks", taught, candidates)

    def suites(source: Source, prefix: str = "") -> list[Suite]:
        name = f"{prefix}{source.name}"
        items = [pair for pair in candidates[name] if pair.id not in alike[name]]
        plain = [pair for pair in items if pair.label not in unseen[source.name]]
        others = [pair for pair in items if pair.label in unseen[source.name]]
        made = [_suite(source, plain, protocol.items)]
        if others:
            made.append(replace(_suite(source, others, protocol.items), name=f"{source.name}_unseen", role="unseen"))
        classes = tuple(sorted({pair.label for pair in items})) if source.task == "classification" else ()
        return [replace(suite, classes=classes) for suite in made]

    return Stream(
        updates,
        reference,
        suites=tuple(suite for source in ALL for suite in suites(source)),
        tuning_updates={name: pairs[protocol.new :] or pairs for name, pairs in drawn.items()},
        tuning=tuple(
            suite
            for s in ALL
            if len(candidates[f"{TUNING} {s.name}"]) >= LEAST_TUNING
            for suite in suites(s, f"{TUNING} ")
        ),
        alike={name: len(ids) for name, ids in alike.items() if ids},
    )


def unseen_classes(items: Sequence[FolderItem]) -> frozenset[str]:
    """The classes that are left out of training, by hash."""
    labels = sorted({item.label for item in items}, key=lambda label: share_of(f"unseen:{label}"))
    return frozenset(labels[:UNSEEN_CLASSES])


def _in_suite(source: Source, item: FolderItem) -> bool:
    return item.split == "test" or share_of(f"suite:{item.concept}") < source.wider


def _tunes(source: Source, item: FolderItem) -> bool:
    return share_of(f"{TUNING}:{item.path.name if source.shared else item.concept}") < TUNING_SHARE


def _suite(source: Source, items: Sequence[Pair], limit: int) -> Suite:
    templates = ("{}", *DOMAINS[source.domain].templates) if source.task == "classification" or source.named else ()
    held_out = source in HELD_OUT
    return Suite(
        source.name,
        "held-out" if held_out else "adaptation",
        source.task,
        by_hash(items, limit),
        templates,
        outside=held_out and source.domain not in REFERENCE,
        named=source.named,
    )


def _pair(item: FolderItem) -> Pair:
    """Captions are cut: whole descriptions of game tiles, four times as long as other captions, left budget for only 13
    steps of an update.
    """
    return Pair(f"{item.domain}/{item.path.name}", shortened(item.text), item.bytes, item.label, item.domain)


def shortened(text: str) -> str:
    """A training caption: whole, or cut between words."""
    return text if len(text) <= CAPTION_CHARS else text[:CAPTION_CHARS].rpartition(" ")[0]


def _item(source: Source, item: FolderItem) -> Pair:
    """A suite asks with the first sentence: what the picture shows, without further explanation."""
    text = item.text.partition(". ")[0]
    return Pair(f"{item.domain}/{item.path.name}", text, item.bytes, item.label or (text if source.named else ""))


def by_hash(items: Iterable[Named], limit: int) -> tuple[Named, ...]:
    """At most ``limit``, by hash of the name: the same for every method, order and seed."""
    return tuple(sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())[:limit])


def names_of(suites: Sequence[Suite]) -> dict[str, list[str]]:
    prompts: dict[str, dict[str, None]] = {}
    for suite in suites:
        for name in {pair.label for pair in suite.items if suite.named}:
            prompts.setdefault(name, {}).update(dict.fromkeys(t.replace("{}", name) for t in suite.templates))
    return {name: list(texts) for name, texts in sorted(prompts.items())}
