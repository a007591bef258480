"""The heads of a candidate: learned from the labelled samples of the store, in the candidate's own image space."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.progress import say, track
from core.settings.updates import LearnedHead
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.heads import Head
from streams.rows import Split
from streams.store import ADDRESS, SampleStore
from updater.heads.fit import fit_head

PAGE = 32
"""Images that are read and encoded at once."""


@dataclass
class Labelled:
    """Samples of one split that a head is about: by label their ids and addresses, in the order of a draw."""

    rows: dict[str, list[tuple[bytes, str, int]]] = field(default_factory=lambda: defaultdict(list))

    def drawn(self, most: int, least: int) -> list[tuple[str, str, int]]:
        """(label, id, address) of at most ``most`` samples, as many of each class; classes with fewer than ``least``
        samples are left out. The same rows give the same draw, in whatever order they come."""
        classes = {label: sorted(rows) for label, rows in sorted(self.rows.items()) if len(rows) >= least}
        each = max(least, most // max(len(classes), 1))
        return [(label, name, place) for label, rows in classes.items() for _, name, place in rows[:each]]


def labelled(store: SampleStore, version: int, split: Split, heads: Sequence[LearnedHead]) -> dict[str, Labelled]:
    """By head, the samples that have a label and are of one of its domains."""
    samples = {head.name: Labelled() for head in heads}
    for batch in store.addresses(["id", "label", "domain"], version, split):
        columns = (batch[name].to_pylist() for name in ("id", "label", "domain", ADDRESS))
        for name, label, domain, place in zip(*columns, strict=True):
            for head in heads if label else ():
                if not head.domains or domain in head.domains:
                    key = hashlib.sha256(f"head {name}".encode()).digest()
                    samples[head.name].rows[label].append((key, name, place))
    return samples


def learn_heads(
    engine: ClipEngine, directory: Path, store: SampleStore, version: int, heads: Sequence[LearnedHead], held_out: int
) -> dict[str, Head]:
    """The heads of an adapter, by name. One that cannot be judged or learned yet is left out, which is said.

    Args:
        engine: of the adapter's base; the adapter is made resident.
        held_out: labelled samples that the gate needs of a head's classes.
    """
    name = read_adapter(directory).name
    engine.load(name, directory)
    train, held = (labelled(store, version, split, heads) for split in ("train", "fresh_eval"))
    learned: dict[str, Head] = {}
    for head in heads:
        chosen = train[head.name].drawn(head.max_images, head.min_images)
        classes = sorted({label for label, _, _ in chosen})
        there = sum(len(rows) for label, rows in held[head.name].rows.items() if label in classes)
        if len(classes) < 2:
            say(f"head {head.name}: fewer than two classes have {head.min_images} labelled samples")
        elif there < held_out:
            say(f"head {head.name}: {there} labelled samples are held out, and the gate needs {held_out}")
        else:
            features = _features(engine, name, store, version, [place for _, _, place in chosen], head.name)
            learned[head.name] = fit_head(features, [label for label, _, _ in chosen])
            say(f"head {head.name}: {len(classes)} classes of {len(chosen)} samples")
    return learned


def with_heads(engine: ClipEngine, directory: Path, heads: dict[str, Head], out_dir: Path) -> Path:
    """The same adapter with heads, in a directory of its own that has its new name."""
    files = read_adapter(directory)
    name = write_adapter(out_dir / "with-heads", files.tensors, files.config, engine.base, heads)
    target = out_dir / name
    if not target.exists():
        (out_dir / "with-heads").rename(target)
    return target


def _features(
    engine: ClipEngine, adapter: str, store: SampleStore, version: int, places: Sequence[int], head: str
) -> npt.NDArray[np.float32]:
    pages = [places[start : start + PAGE] for start in range(0, len(places), PAGE)]
    encoded: Iterator[npt.NDArray[np.float32]] = (
        engine.encode_images(
            np.stack([engine.base.preprocess.pixels(row["image"]) for row in store.rows_at(page, ["image"], version)]),
            adapter,
        )
        for page in pages
    )
    return np.concatenate(list(track(encoded, f"head {head}: images", total=len(pages))))
