"""Scores a CLIP on a suite through the serving engine. Answers are ranks: of the true class among the classes, of the
best matching text for an image, of the best matching image for a text. Rank 0 is right. Ties and non-finite scores
count against the model: a collapsed model, for which everything is equally similar, must not look perfect."""

from __future__ import annotations

import base64
import contextlib
import io
import math
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from core.digests import digest12, digest_json
from core.errors import GateError
from core.files import replacing
from core.progress import track
from serving.engines.calibration import shortened
from serving.engines.clip import ClipEngine
from serving.engines.heads import Head, heads_digest
from updater.gate.suite_items import Item, open_picture, read_picture
from updater.gate.suites import Suite
from updater.gate.verdict import Regression

Vectors = NDArray[np.float32]
T = TypeVar("T")
View = tuple[NDArray[np.floating], NDArray[np.bool_]]
"""For one way of asking: similarities [n, choices], and which choices are right."""

IMAGE_BATCH = 8
TEXT_BATCH = 16
"""On a CPU small batches stay in its caches: 6 ms an image in batches of 8, 12 in batches of 64 (lite0, 128 px)."""
GPU_BATCH = 64
KEEP_PIXELS = 256 * 1024 * 1024
KEEP_FILES = 400
"""Score files to keep in a folder, the newest (each about 10 KB)."""
SIDE = 96
"""Longest side of a thumbnail, in pixels: a dozen for each of ten suites stay below 0.5 MB."""
MOST = 12
MOST_CHARS = 200


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One model's answers. Arrays are aligned with `ids`: shapes [n] and [n, views]."""

    ids: NDArray[np.str_]
    ranks: NDArray[np.int32]
    answers: NDArray[np.int32]
    """The model's first choice: an index into `Scorer.choices(suite)` of that view."""
    k: int

    @property
    def hits(self) -> NDArray[np.float64]:
        """1 if the right answer is among the first k, else 0: [n, views]."""
        return (self.ranks < self.k).astype(np.float64)


class Scorer:
    """Scores suites for the adapters resident in one engine; embeddings and scores are computed once. Scores are cached
    on disk by suite digest, embedding spaces (content digests of everything that makes a vector) and the engine's
    precision, whose rounding must not differ between compared models."""

    def __init__(self, engine: ClipEngine, cache: Path | None = None) -> None:
        self.engine = engine
        self.cache = cache
        self._images: dict[str, dict[str, Vectors]] = {}
        self._texts: dict[str, dict[str, Vectors]] = {}
        self._pixels: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._keeping = threading.Lock()
        self._length: int | None = None

    def shorter(self, length: int) -> Self:
        """The same scorer, with the first numbers of each vector. Both share what they compute."""
        other = copy(self)
        other._length = length
        return other

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> Outcomes:
        """Answers of one model (`None` is the base) to one suite. Raises GateError for an unreadable image."""
        items, folder = suite.items(), self.cache or suite.cache
        own_ids = np.array([item.id for item in items], dtype=np.str_)
        shape = (len(items), len(suite.views))

        def compute() -> tuple[NDArray[Any], ...]:
            ask = self._classify if suite.task == "classification" else self._retrieve
            views = ask(suite, items, adapter, label or adapter or "base")
            ranks = np.stack([rank_of_best(similarity, right) for similarity, right in views], axis=1)
            first = np.stack([similarity.argmax(axis=1) for similarity, _ in views], axis=1)
            return own_ids, ranks, first.astype(np.int32)

        def fits(known: Sequence[NDArray[Any]]) -> bool:
            return known[0].tolist() == own_ids.tolist() and known[1].shape == known[2].shape == shape

        path = folder and folder / f"{digest12(digest_json(self.key(suite, adapter)))}.npz"
        ids, ranks, answers = kept(path, ("ids", "ranks", "answers"), compute, fits)
        return Outcomes(ids, ranks, answers, suite.k)

    def choices(self, suite: Suite) -> tuple[list[str], ...]:
        items = suite.items()
        texts = sorted({item.text for item in items})
        return (texts,) if suite.task == "classification" else (texts, [item.id for item in items])

    def chance(self, suite: Suite, some: Sequence[Item] | None = None) -> float:
        """Expected score of random answers to some or all items: a hit if one of the right choices is among k drawn."""
        items, choices = suite.items(), self.choices(suite)
        same = Counter(item.text for item in items)
        shares = [min(1.0, suite.k / len(choices[0]))]  # one right class, or one right text
        if suite.task == "retrieval":
            asked = items if some is None else some
            draws = max(1, math.comb(len(items), suite.k))  # none of fewer than k items: all of them are hits
            wrong = [math.comb(len(items) - same[i.text], suite.k) / draws for i in asked]
            shares.append(1.0 - sum(wrong) / len(wrong))
        return sum(shares) / len(shares)

    def images(self, items: Sequence[Item], adapter: str | None, label: str = "images") -> Vectors:
        """L2-normalised image vectors [n, dim]; each distinct item is embedded once per space."""
        known = self._images.setdefault(self.engine.spaces(adapter).image, {})
        missing = list({item.source: item for item in items if item.source not in known}.values())

        def encode(batch: Sequence[Item]) -> Vectors:
            return self.engine.encode_images(np.stack([self.pixels(item) for item in batch]), adapter)

        for batch, vectors in self._encoded(missing, IMAGE_BATCH, encode, f"{label}: images"):
            known.update({item.source: vector for item, vector in zip(batch, vectors, strict=True)})
        return shortened(np.stack([known[item.source] for item in items]), self._length)

    def texts(self, texts: Sequence[str], adapter: str | None, label: str = "texts") -> Vectors:
        """L2-normalised text vectors [n, dim]; each distinct text is embedded once per space."""
        known = self._texts.setdefault(self.engine.spaces(adapter).text, {})
        # Texts of similar length together: a batch is as long as its longest text.
        missing = sorted({text for text in texts if text not in known}, key=lambda text: (len(text), text))

        def encode(batch: Sequence[str]) -> Vectors:
            return self.engine.encode_texts(list(batch), adapter)

        for batch, vectors in self._encoded(missing, TEXT_BATCH, encode, f"{label}: texts"):
            known.update(zip(batch, vectors, strict=True))
        return shortened(np.stack([known[text] for text in texts]), self._length)

    def _encoded(
        self, items: Sequence[T], size: int, encode: Callable[[Sequence[T]], Vectors], label: str
    ) -> Iterator[tuple[Sequence[T], Vectors]]:
        """Batches with their vectors, in order, on as many threads as torch was given, each computing alone. Several
        threads in one forward pass wait for each other at every layer; next to a busy server that made a gate run four
        times as long."""
        threads = torch.get_num_threads() if self.engine.device.type == "cpu" else 1
        size = size if self.engine.device.type == "cpu" else GPU_BATCH
        batches = [items[i : i + size] for i in range(0, len(items), size)]
        if not batches:
            return
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(
                threads, thread_name_prefix="gate", initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                yield from zip(batches, track(pool.map(encode, batches), label, total=len(batches)), strict=True)
        finally:
            torch.set_num_threads(threads)

    def pixels(self, item: Item) -> NDArray[np.uint8]:
        """The item's image for the engine: uint8 [S, S, 3]."""
        cached = self._pixels.get(item.source)
        if cached is not None:
            return cached
        pixels = read_picture(item, self.engine.base.preprocess.pixels)
        with self._keeping:
            self._pixels[item.source] = pixels
            while len(self._pixels) * pixels.nbytes > KEEP_PIXELS:
                self._pixels.popitem(last=False)
        return pixels

    def _classify(self, suite: Suite, items: Sequence[Item], adapter: str | None, label: str) -> list[View]:
        """Score by probabilities of the adapter's head (0 for a class unknown to it), or by cosines with prompts."""
        (classes,) = self.choices(suite)
        similarity: NDArray[np.float64]
        if (head := self._head(suite, adapter)) is not None:
            known = {name: number for number, name in enumerate(head.labels)}
            answers = head.classify(self.images(items, adapter, label)).probabilities
            columns = [answers[:, known[name]] if name in known else np.zeros(len(items)) for name in classes]
            similarity = np.stack(columns, axis=1)
        else:
            means = self.class_vectors(suite, classes, adapter, label)
            similarity = np.asarray(self.images(items, adapter, label) @ means.T, np.float64)
        return [(similarity, np.array([[name == item.text for name in classes] for item in items]))]

    def class_vectors(self, suite: Suite, classes: Sequence[str], adapter: str | None, label: str) -> Vectors:
        """Unit vectors [classes, dim]: means over the suite's templates."""
        prompts = [prompt(template, suite, name) for name in classes for template in suite.templates]
        flat = self.texts(prompts, adapter, label)
        means = flat.reshape(len(classes), len(suite.templates), -1).mean(axis=1)
        unit: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        return unit

    def _head(self, suite: Suite, adapter: str | None) -> Head | None:
        return self.engine.heads(adapter).get(suite.head) if suite.head else None

    def _retrieve(self, suite: Suite, items: Sequence[Item], adapter: str | None, label: str) -> list[View]:
        unique, _ = self.choices(suite)
        index = {text: i for i, text in enumerate(unique)}
        own = np.array([index[item.text] for item in items])
        similarity = self.images(items, adapter, label) @ self.texts(unique, adapter, label).T
        to_text = own[:, None] == np.arange(len(unique))[None, :]
        to_image = own[:, None] == own[None, :]
        return [(similarity, to_text), (similarity.T[own], to_image)]

    def key(self, suite: Suite, adapter: str | None) -> list[str]:
        spaces = self.engine.spaces(adapter)
        head = self._head(suite, adapter)
        own = [heads_digest({suite.head: head})] if head else []
        own += [f"first {self._length}"] if self._length else []
        return [suite.digest(), spaces.image, spaces.text, self.engine.precision, *own]


def prompt(template: str, suite: Suite, label: str) -> str:
    return template.replace("{}", suite.names.get(label, label.replace("_", " ")))


def rank_of_best(similarity: NDArray[np.floating], right: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number of wrong answers that do not score below the best right one. Both arrays have shape [n, choices]. "Not
    below" rather than "above": a tie or a NaN on either side counts against the model."""
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks: NDArray[np.int32] = (~(similarity < best) & ~right).sum(axis=1, dtype=np.int32)
    return ranks


def kept(
    path: Path | None,
    names: Sequence[str],
    compute: Callable[[], Sequence[NDArray[Any]]],
    fits: Callable[[Sequence[NDArray[Any]]], bool],
) -> Sequence[NDArray[Any]]:
    """Load named arrays from a file, or compute and save them if there is none that fits. `path` None: no file."""
    arrays: Sequence[NDArray[Any]] | None = load_arrays(path, names) if path else None
    if arrays is None or not fits(arrays):
        arrays = compute()
        if path:
            store_arrays(path, **dict(zip(names, arrays, strict=True)))
    return arrays


def store_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    with replacing(path, durable=False) as staging:
        np.savez_compressed(staging, **cast(dict[str, Any], arrays))
    by_age = sorted(path.parent.glob("*.npz"), key=_age, reverse=True)
    for old in by_age[KEEP_FILES:]:
        old.unlink(missing_ok=True)


def load_arrays(path: Path, names: Sequence[str]) -> list[NDArray[Any]] | None:
    """Arrays of these names; None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in names]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
    with contextlib.suppress(OSError):
        path.touch()  # the oldest unused go first
    return arrays


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process dropped it
        return 0.0


def worst_items(scorer: Scorer, suite: Suite, before: Outcomes, after: Outcomes) -> tuple[Regression, ...]:
    """Hits that became misses, the largest fall first; an item appears once, in its worse view."""
    fall = np.where((before.hits > after.hits), after.ranks - before.ranks, 0)
    view, depth = fall.argmax(axis=1), fall.max(axis=1)
    order = np.lexsort((before.ids, -depth))[:MOST]
    choices = [_choices(scorer, suite, number) for number in range(len(suite.views))]
    return tuple(
        _worse(
            suite.items()[i],
            suite.views[view[i]],
            (int(before.ranks[i, view[i]]), int(after.ranks[i, view[i]])),
            (choices[view[i]][before.answers[i, view[i]]], choices[view[i]][after.answers[i, view[i]]]),
        )
        for i in order
        if depth[i] > 0
    )


def worst_answers(
    suite: Suite, before: tuple[Sequence[str], NDArray[np.float64]], after: tuple[Sequence[str], NDArray[np.float64]]
) -> tuple[Regression, ...]:
    """Questions with a lower score than before, the largest fall first; both arguments are answers and their scores."""
    items, fall = suite.items(), before[1] - after[1]
    order = np.lexsort((np.array([item.id for item in items]), -fall))[:MOST]
    return tuple(
        _worse(items[i], suite.views[0], (int(before[1][i] < 1.0), 1), (before[0][i], after[0][i]))
        for i in order
        if fall[i] > 0
    )


def _choices(scorer: Scorer, suite: Suite, view: int) -> Sequence[Item | str]:
    """Possible answers in a view: items if their image is the answer, or if they are samples and their caption is."""
    items = suite.items()
    if suite.views[view] == "text to image":
        return items
    by_text: dict[str, Item | str] = {item.text: item for item in items if item.sample_id}
    return [by_text.get(text, text) for text in scorer.choices(suite)[view]]


def _worse(item: Item, view: str, ranks: tuple[int, int], answers: tuple[Item | str, Item | str]) -> Regression:
    shown = not item.sample_id  # what a model answers to a sample's question may repeat the sample
    before, after = (_shown(answer) if shown else "" for answer in answers)
    return Regression(
        id=item.id,
        text=_shown(item),
        view=view,
        rank_before=ranks[0],
        rank_after=ranks[1],
        answer_before=before,
        answer_after=after,
        thumbnail=thumbnail(item) if shown else "",
        expected=(item.text if item.asked else ", ".join(dict.fromkeys(item.answers)))[:MOST_CHARS] if shown else "",
        sample=item.sample_id,
        sample_before="" if isinstance(answers[0], str) else answers[0].sample_id,
        sample_after="" if isinstance(answers[1], str) else answers[1].sample_id,
    )


def _shown(answer: Item | str) -> str:
    if isinstance(answer, str):
        return answer[:MOST_CHARS]
    return "" if answer.sample_id else answer.text[:MOST_CHARS]


def thumbnail(item: Item) -> str:
    """JPEG data URI of at most SIDE pixels; empty if the image cannot be read."""
    try:
        image = open_picture(item)
    except GateError:
        return ""
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
