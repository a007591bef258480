"""Vectors of all suites under one adapter, through the serving engine, and the outcomes that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.continual.stream import RECALL_AT, Suite
from ops.files import replacing
from serving.engines.clip import ClipEngine
from updater.gate.ranking import rank_of_best
from updater.gate.score import IMAGE_BATCH, TEXT_BATCH

Vectors = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """Unit vectors of each image by its pair's id, and of each text, under one version of the model."""

    images: Mapping[str, Vectors]
    texts: Mapping[str, Vectors]

    def write(self, path: Path) -> None:
        """Keep them, float16, whole or not at all. Names are not kept: they follow from the suites."""
        images, texts = (np.stack(list(side.values())).astype(np.float16) for side in (self.images, self.texts))
        with replacing(path) as staging:
            np.savez(staging, images=images, texts=texts)


class Evaluator:
    """Evaluates one engine's adapters on suites; pixels are decoded once."""

    def __init__(self, engine: ClipEngine, suites: Sequence[Suite]) -> None:
        self.engine = engine
        self.suites = suites
        pairs = {pair.id: pair for suite in suites for pair in suite.items}
        self._ids = list(pairs)
        self._pixels = np.stack([engine.base.preprocess.pixels(pair.read()) for pair in pairs.values()])
        wanted = {text for suite in suites for text in _texts(suite)}
        self._words = sorted(wanted, key=lambda text: (len(text), text))  # texts of like length share a batch

    def encode(self, adapter: str | None) -> Encoded:
        """All images and texts under an adapter; None is the base."""
        images = [
            self.engine.encode_images(self._pixels[start : start + IMAGE_BATCH], adapter)
            for start in range(0, len(self._ids), IMAGE_BATCH)
        ]
        texts = [
            self.engine.encode_texts(self._words[start : start + TEXT_BATCH], adapter)
            for start in range(0, len(self._words), TEXT_BATCH)
        ]
        return Encoded(
            dict(zip(self._ids, np.concatenate(images), strict=True)),
            dict(zip(self._words, np.concatenate(texts), strict=True)),
        )

    def read(self, path: Path) -> Encoded:
        """What :meth:`Encoded.write` wrote of these suites."""
        with np.load(path) as arrays:
            images, texts = arrays["images"].astype(np.float32), arrays["texts"].astype(np.float32)
        return Encoded(dict(zip(self._ids, images, strict=True)), dict(zip(self._words, texts, strict=True)))

    def outcomes(self, encoded: Encoded) -> dict[str, Bools]:
        """By suite: whether each item was answered rightly; [n, 2] for retrieval both ways, [n, 1] for classes."""
        return {suite.name: _outcome(suite, encoded) for suite in self.suites}


def images_of(suite: Suite, encoded: Encoded) -> Vectors:
    """Vectors of a suite's images, [n, dim]."""
    return np.stack([encoded.images[pair.id] for pair in suite.items])


def texts_of(suite: Suite, encoded: Encoded) -> Vectors:
    """Vectors of the items' own texts, [n, dim]."""
    return np.stack([encoded.texts[pair.text] for pair in suite.items])


def right_images(suite: Suite) -> Bools:
    """Which images answer the text of which item, [n, n]: those that carry the same one."""
    words = np.array([pair.text for pair in suite.items])
    same: Bools = words[:, None] == words[None, :]
    return same


def _texts(suite: Suite) -> list[str]:
    if suite.task == "retrieval":
        return [pair.text for pair in suite.items]
    return [_prompt(template, name) for name in _classes(suite) for template in suite.templates]


def _classes(suite: Suite) -> list[str]:
    return sorted({pair.label for pair in suite.items})


def _prompt(template: str, name: str) -> str:
    return template.replace("{}", name)


def _outcome(suite: Suite, encoded: Encoded) -> Bools:
    if suite.task == "classification":
        return _classified(suite, encoded)[:, None]
    images = images_of(suite, encoded)
    texts = sorted({pair.text for pair in suite.items})
    own = np.array([texts.index(pair.text) for pair in suite.items])
    similarity = images @ np.stack([encoded.texts[text] for text in texts]).T
    to_text = rank_of_best(similarity, own[:, None] == np.arange(len(texts))[None, :])
    to_image = rank_of_best(texts_of(suite, encoded) @ images.T, right_images(suite))
    return np.stack([to_text, to_image], axis=1) < RECALL_AT


def _classified(suite: Suite, encoded: Encoded) -> Bools:
    classes = _classes(suite)
    heads = np.stack([
        np.mean([encoded.texts[_prompt(template, name)] for template in suite.templates], axis=0) for name in classes
    ])  # fmt: skip
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    right = np.array([[pair.label == name for name in classes] for pair in suite.items])
    similarity = images_of(suite, encoded) @ heads.T
    ranks: Bools = rank_of_best(similarity, right) == 0
    return ranks
