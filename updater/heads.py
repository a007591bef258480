"""Heads of a candidate, learned from the labelled samples of the store in the candidate's own image space. A head has
class means and a covariance shared by all classes, calibrated on held-out folds."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.progress import progress_log, track
from core.settings.updates import LearnedHead
from serving.engines.adapters import read_adapter, write_adapter
from serving.engines.clip import ClipEngine
from serving.engines.heads import Floats, Head
from streams.store.rows import Split
from streams.store.sample_store import ADDRESS, SampleStore

FOLDS = 10
"""With two folds, the means and covariance used for calibration were so much worse that probabilities came out half as
certain as they were right: an ECE of 11 to 22 points on three of four domains, and 5 to 13 with ten."""
LEAST = 2
"""Minimum images of a class: one of them is outside each fold."""
JUDGED = 5000
SCALES = np.geomspace(0.01, 4.0, 60)
KNOWN = 0.95
"""Share of images of known classes that the threshold accepts."""
PAGE = 32


@dataclass
class Labelled:
    rows: dict[str, list[tuple[bytes, str, int]]] = field(default_factory=lambda: defaultdict(list))

    def drawn(self, most: int, least: int) -> list[tuple[str, str, int]]:
        """(label, id, address) of at most ``most`` samples, equally many per class; classes with fewer than ``least``
        samples are left out. Independent of the order of rows."""
        classes = {label: sorted(rows) for label, rows in sorted(self.rows.items()) if len(rows) >= least}
        each = max(least, most // max(len(classes), 1))
        return [(label, name, place) for label, rows in classes.items() for _, name, place in rows[:each]]


def labelled(store: SampleStore, version: int, split: Split, heads: Sequence[LearnedHead]) -> dict[str, Labelled]:
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
    """Learn the heads of an adapter, by name. A head that cannot be judged or learned yet is logged and left out.
    ``engine``: of the adapter's base; the adapter is made resident. ``held_out``: labelled samples of a head's classes
    that the gate needs."""
    name = read_adapter(directory).name
    engine.load(name, directory)
    train, held = (labelled(store, version, split, heads) for split in ("train", "fresh_eval"))
    learned: dict[str, Head] = {}
    for head in heads:
        chosen = train[head.name].drawn(head.max_images, head.min_images)
        classes = sorted({label for label, _, _ in chosen})
        there = sum(len(rows) for label, rows in held[head.name].rows.items() if label in classes)
        if len(classes) < 2:
            progress_log.info(f"head {head.name}: fewer than two classes have {head.min_images} labelled samples")
        elif there < held_out:
            progress_log.info(f"head {head.name}: {there} labelled samples are held out, and the gate needs {held_out}")
        else:
            features = _features(engine, name, store, version, [place for _, _, place in chosen], head.name)
            learned[head.name] = fit_head(features, [label for label, _, _ in chosen])
            progress_log.info(f"head {head.name}: {len(classes)} classes of {len(chosen)} samples")
    return learned


def with_heads(engine: ClipEngine, directory: Path, heads: dict[str, Head], out_dir: Path) -> Path:
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


def fit_head(features: npt.ArrayLike, labels: Sequence[str]) -> Head:
    """Fit a head to unit features [n, dim] and their labels. The covariance is shrunk towards a multiple of the
    identity (Ledoit and Wolf 2004). The scale of probabilities minimises the cross entropy, and the threshold for "none
    of these" is a quantile of distances, both on folds that the means and covariance did not use. Raises ValueError
    with fewer than two classes, or a class of one image."""
    x = np.asarray(features, np.float64)
    names = sorted(set(labels))
    if len(names) < 2:
        raise ValueError("a head tells two classes apart at least")
    if alone := [name for name, count in Counter(labels).items() if count < LEAST]:
        raise ValueError(f"class {alone[0]!r} has one image, and a head needs {LEAST} of each")
    place = {name: number for number, name in enumerate(names)}
    y = np.array([place[label] for label in labels])
    fold = _folds(y)
    judged = np.zeros(len(x), bool)
    judged[:: max(1, len(x) // JUDGED)] = True
    scores, distances, right = [], [], []
    for number in range(fold.max() + 1):
        outside, rows = fold != number, (fold == number) & judged
        answers = _fitted(names, x[outside], y[outside], 1.0, 1.0).classify(x[rows])
        scores.append(np.log(answers.probabilities.clip(1e-300)))
        distances.append(answers.distance)
        right.append(y[rows])
    logits, own = np.concatenate(scores), np.concatenate(right)
    scale = min(SCALES, key=lambda each: _cross_entropy(each * logits, own))
    threshold = max(float(np.quantile(np.concatenate(distances), KNOWN)), 1e-6)
    return _fitted(names, x, y, float(scale), threshold)


def _fitted(names: Sequence[str], x: Floats, y: npt.NDArray[np.int_], scale: float, threshold: float) -> Head:
    counts = np.bincount(y, minlength=len(names))
    means = np.stack([x[y == number].mean(axis=0) for number in range(len(names))])
    precision = np.linalg.inv(_shrunk(x - means[y], len(names)))
    return Head(
        labels=tuple(names),
        means=means.astype(np.float32),
        precision=((precision + precision.T) / 2).astype(np.float32),
        center=x.mean(axis=0).astype(np.float32),
        scale=scale,
        threshold=threshold,
        counts=tuple(int(count) for count in counts),
    )


def _shrunk(residuals: Floats, classes: int) -> Floats:
    """Covariance [dim, dim] of residuals with the shrinkage of Ledoit and Wolf (2004)."""
    count, dim = residuals.shape
    sample = residuals.T @ residuals / count
    level = float(np.trace(sample)) / dim
    identity = np.eye(dim)
    away = float(((sample - level * identity) ** 2).sum()) / dim
    squares = (residuals**2).sum(axis=1)
    noise = float((squares**2).mean() - (sample**2).sum()) / count / dim
    share = 1.0 if away <= 0 else min(1.0, max(noise, 0.0) / away)
    unbiased = count / max(count - classes, 1)  # the means took as many degrees of freedom
    shrunk: Floats = unbiased * ((1 - share) * sample + share * level * identity) + 1e-8 * identity
    return shrunk


def _folds(y: npt.NDArray[np.int_]) -> npt.NDArray[np.int_]:
    fold = np.zeros(len(y), dtype=int)
    for number in np.unique(y):
        rows = np.flatnonzero(y == number)
        fold[rows] = np.arange(len(rows)) % FOLDS
    return fold


def _cross_entropy(logits: Floats, y: npt.NDArray[np.int_]) -> float:
    top = logits.max(axis=1, keepdims=True)
    total = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
    return float((total - logits[np.arange(len(y)), y]).mean())
