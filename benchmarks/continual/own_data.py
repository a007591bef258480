"""A stream of anybody's data sets, and suites of the gate, in place of those of the benchmark.

Each data set is an update, in the order given. The suite of its name, if there is one for each, asks what was learned;
all other suites ask what was kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.continual.looks import left_out
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import Stream, Suite, by_hash, shortened
from core.digests import digest12
from core.errors import ConfigError, RecordError
from core.progress import progress_log
from streams.publish.datasets import read_dataset
from updater.data.pools import Pair
from updater.gate.suites import Suite as GateSuite
from updater.gate.suites import load_suites

STEPS = 26
"""Steps of an update that the default is given, as on the shipped base."""


@dataclass(frozen=True)
class OwnData:
    """Paths of data sets in the formats of ``ratchet publish``, and of the gate's suites."""

    updates: tuple[Path, ...]
    suites: tuple[Path, ...]
    reference: tuple[Path, ...] = ()
    """Data of the base's own domains, which every update may rehearse."""


def own_stream(home: Path, data: OwnData, protocol: Protocol) -> Stream:
    """Raises ConfigError, GateError, RecordError."""
    updates, suites, reference = data.updates, data.suites, data.reference
    names = [path.stem for path in updates]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sets are named {_twice(names)!r}.", "Rename one of them: a name is an update's.")
    asked = load_suites(suites, home, "clip", protocol.items)
    missing = sorted(set(names) - {suite.name for suite in asked})
    if missing:
        raise ConfigError(
            f"no suite asks what the update {missing[0]!r} teaches.",
            f"Give one, {missing[0]}.yaml, with items that the data set does not hold (--suite).",
        )
    if len(asked) == len(names):
        raise ConfigError("no suite asks what is kept.", "Give one at least that is named after no data set (--suite).")
    pairs = {name: _pairs(path, protocol.new) for name, path in zip(names, updates, strict=True)}
    rehearsed = by_hash((pair for path in reference for pair in _pairs(path, protocol.reference)), protocol.reference)
    candidates = {suite.name: _items(suite) for suite in asked}
    taught = [pair for each in (*pairs.values(), rehearsed) for pair in each]
    alike = left_out(home / "bench" / "continual" / "looks", taught, candidates)
    made = [_suite(each, candidates[each.name], alike[each.name], each.name in pairs, protocol) for each in asked]
    return Stream(pairs, rehearsed, tuple(made), alike={name: len(ids) for name, ids in alike.items() if ids})


def _pairs(path: Path, limit: int) -> tuple[Pair, ...]:
    """Pairs of a data set; rows that cannot be used are counted."""
    pairs, bad = [], 0
    for number, row in enumerate(read_dataset(path, split=None)):
        item = row.content
        if isinstance(item, RecordError) or not item.text:
            bad += 1
        elif item.split != "test":
            pairs.append(Pair(f"{path.stem}/{number}", shortened(item.text), item.bytes, item.label, path.stem))
    if bad:
        progress_log.info(f"{path}: {bad} rows cannot be used, and are left out")
    if not pairs:
        raise ConfigError(f"{path} holds no picture with a text.", "Look at it with `ratchet publish --check`.")
    return tuple(_named(pair) for pair in by_hash(pairs, limit))


def _items(suite: GateSuite) -> list[Pair]:
    """Items of a suite; the text of one with classes is its class, as prompts call it."""
    named = [(item, suite.names.get(item.text, item.text)) for item in suite.items()]
    return [_named(Pair(f"{suite.name}/{item.id}", text, item.read, text)) for item, text in named]


def _named(pair: Pair) -> Pair:
    """With its picture in its id, because a row of a data set may change between two runs."""
    return replace(pair, id=f"{pair.id}-{digest12(pair.read())}")


def _suite(suite: GateSuite, items: Sequence[Pair], alike: Sequence[str], learned: bool, protocol: Protocol) -> Suite:
    left = [pair for pair in items if pair.id not in alike]
    if len(left) < 2:
        raise ConfigError(
            f"suite {suite.name}: all but {len(left)} of its {len(items)} pictures look like a training picture.",
            "Ask with pictures that no update and no reference pool holds.",
        )
    named = suite.task == "classification"
    return Suite(
        suite.name, "adaptation" if learned else "held-out", "classification" if named else "retrieval",
        by_hash(left, protocol.items), tuple(suite.templates) if named else (), outside=False,
        classes=tuple(sorted({pair.label for pair in items})) if named else (),
    )  # fmt: skip


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)
