"""Vectors of all suites under one adapter, and the outcomes.

The part that no adapter of a chain changes is computed once: a tower starts at its boundary, as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.continual.stream import RECALL_AT, Suite, names_of
from core.files import replacing
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.lora import effective_weights
from updater.adapters.trained_layers import Which, first_touched
from updater.data.pools import Pair
from updater.families.clip_towers import SplitTower, stack_boundaries
from updater.gate.score import IMAGE_BATCH, TEXT_BATCH, rank_of_best

Vectors = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """Unit vectors of each image by its pair's ID, and of each text, under one version of the model."""

    images: Mapping[str, Vectors]
    texts: Mapping[str, Vectors]

    def write(self, path: Path) -> None:
        """Write them atomically as float16, without names, which follow from the suites."""
        images, texts = (np.stack(list(side.values())).astype(np.float16) for side in (self.images, self.texts))
        with replacing(path) as staging:
            np.savez(staging, images=images, texts=texts)


class Evaluator:
    """Evaluates a base's adapters on suites, as the trainer computes (float32)."""

    def __init__(self, base: ClipBase, suites: Sequence[Suite], cache: Path | None = None) -> None:
        """``cache``: a folder of this base and these suites, for what all chains share."""
        self.base = base
        self.suites = suites
        self.cache = cache
        self.names = names_of(suites)
        pairs = {pair.id: pair for suite in suites for pair in suite.items}
        self._ids = list(pairs)
        wanted = {text for suite in suites for text in _texts(suite)} | {
            text for prompts in self.names.values() for text in prompts
        }
        self._words = sorted(wanted, key=lambda text: (len(text), text))  # texts of like length share a batch
        self._model = base.build_model()
        self._sides: dict[Which, _Side] = {}
        tokenize = base.tokenizer()
        self._inputs: dict[Which, list[Any]] = {
            "image": [batch.numpy() for batch in self._pixels(list(pairs.values()))],
            "text": [
                tokenize(self._words[start : start + TEXT_BATCH]) for start in range(0, len(self._words), TEXT_BATCH)
            ],
        }

    def _pixels(self, pairs: Sequence[Pair]) -> list[Tensor]:
        """Pictures of the suites, in batches, uint8 [n, size, size, 3]."""
        batches = [pairs[start : start + IMAGE_BATCH] for start in range(0, len(pairs), IMAGE_BATCH)]

        def read() -> list[Tensor]:
            pictures = ((self.base.preprocess.pixels(pair.read()) for pair in batch) for batch in batches)
            return [torch.from_numpy(np.stack(list(batch))) for batch in pictures]

        return _cached(self.cache and self.cache / "pixels.safetensors", [len(batch) for batch in batches], read)

    def encode(self, adapter: Path | None) -> Encoded:
        """All images and texts under an adapter's directory; None is the base."""
        weights = effective_weights(adapter, self._model) if adapter else {}
        touched = {name.rpartition(".")[0] for name in weights}
        images, texts = (self._encoded(which, weights, touched) for which in ("image", "text"))
        return Encoded(dict(zip(self._ids, images, strict=True)), dict(zip(self._words, texts, strict=True)))

    def _encoded(self, which: Which, weights: Mapping[str, Tensor], touched: set[str]) -> Vectors:
        """Vectors [n, dim] of one tower."""
        side = self._sides.get(which)
        cut = first_touched(touched, self._model, which) if touched else 0
        if side is None or (touched and (side.tower.cut > cut or side.tower.cut == 0 < cut)):
            boundaries = self.cache / f"{which}-{cut}.safetensors" if self.cache else None
            side = self._sides[which] = _Side(self.base, which, cut, self._inputs[which], boundaries)
        with torch.inference_mode():
            return side.vectors({name: value for name, value in weights.items() if tower_of(name) == which})

    def features(self, images: Sequence[bytes]) -> Vectors:
        """The base's features of other pictures, [n, dim]."""
        pixels = np.stack([self.base.preprocess.pixels(image) for image in images])
        side = _Side(self.base, "image", 0, [pixels])
        with torch.inference_mode():
            return side.vectors({})

    def read(self, path: Path) -> Encoded:
        with np.load(path) as arrays:
            images, texts = arrays["images"].astype(np.float32), arrays["texts"].astype(np.float32)
        return Encoded(dict(zip(self._ids, images, strict=True)), dict(zip(self._words, texts, strict=True)))

    def outcomes(self, encoded: Encoded) -> dict[str, Bools]:
        """By suite, whether each item was answered correctly; [n, 2] for retrieval in both directions, [n, 1] for
        classes.
        """
        return {suite.name: _outcome(suite, encoded) for suite in self.suites}

    def named(self, encoded: Encoded) -> dict[str, Bools]:
        """By suite with names: whether each item's name was found among those of all domains, [n, 1] (X-TAIL)."""
        named = [suite for suite in self.suites if suite.named]
        if not named:
            return {}
        heads = _heads(self.names.values(), encoded)
        return {suite.name: _classified(suite, encoded, list(self.names), heads)[:, None] for suite in named}


def _cached(path: Path | None, lengths: Sequence[int], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Tensors of these lengths from their file, computed and stored if missing."""
    if path is not None and path.is_file():
        cached = [tensor for _, tensor in sorted(load_file(path).items())]
        if [len(tensor) for tensor in cached] == list(lengths):
            return cached
    tensors = compute()
    if path is not None:
        with replacing(path, durable=False) as staging:
            save_file({f"{number:06}": tensor for number, tensor in enumerate(tensors)}, staging)
    return tensors


class _Side:
    """One tower over fixed inputs, from its boundary on; boundaries are computed on first use."""

    def __init__(
        self, base: ClipBase, which: Which, cut: int, inputs: Sequence[Any], cached: Path | None = None
    ) -> None:
        """``cached``: the file that boundaries are kept in."""
        self.base, self.which, self.inputs, self.cached = base, which, inputs, cached
        model = base.build_model()
        self._parameters = dict(model.eval().named_parameters())  # by their own names, which a split tower changes
        self.tower = SplitTower(model, which, cut)
        self._boundaries: list[Tensor] = []

    def vectors(self, weights: Mapping[str, Tensor]) -> Vectors:
        """Unit vectors under other weights, [n, dim]."""
        if self.tower.cut and not self._boundaries:
            self._boundaries = self._recorded()
        before = {name: self._parameters[name].data for name in weights}
        for name, value in weights.items():
            self._parameters[name].data = value
        try:
            parts = [self._run(number, batch) for number, batch in enumerate(self.inputs)]
        finally:
            for name, value in before.items():
                self._parameters[name].data = value
        return torch.cat(parts).numpy()

    def _recorded(self) -> list[Tensor]:

        def record() -> list[Tensor]:
            return [self.tower.record(self._tensor(batch))[1].contiguous() for batch in self.inputs]

        return _cached(self.cached, [len(batch) for batch in self.inputs], record)

    def _run(self, number: int, batch: Any) -> Tensor:
        inputs = self._tensor(batch)
        if not self.tower.cut:
            return self.tower.whole(inputs)
        boundary = self._boundaries[number]
        if self.which == "image":
            return self.tower.resume(boundary, inputs[:1])
        return self.tower.resume(stack_boundaries(list(boundary), inputs.shape[1], inputs.device), inputs)

    def _tensor(self, batch: Any) -> Tensor:
        return self.base.preprocess.normalise(batch) if self.which == "image" else batch


def images_of(suite: Suite, encoded: Encoded) -> Vectors:
    """Vectors of a suite's images, [n, dim]."""
    return np.stack([encoded.images[pair.id] for pair in suite.items])


def texts_of(suite: Suite, encoded: Encoded) -> Vectors:
    """Vectors of the items' own texts, [n, dim]."""
    return np.stack([encoded.texts[pair.text] for pair in suite.items])


def right_images(suite: Suite) -> Bools:
    """Which images are correct for the text of which item, [n, n]: those with the same text."""
    words = np.array([pair.text for pair in suite.items])
    same: Bools = words[:, None] == words[None, :]
    return same


def _texts(suite: Suite) -> list[str]:
    if suite.task == "retrieval":
        return [pair.text for pair in suite.items]
    return [text for prompts in _prompts(suite).values() for text in prompts]


def _prompts(suite: Suite) -> dict[str, list[str]]:
    classes = suite.classes or sorted({pair.label for pair in suite.items})
    return {name: [template.replace("{}", name) for template in suite.templates] for name in classes}


def _outcome(suite: Suite, encoded: Encoded) -> Bools:
    if suite.task == "classification":
        prompts = _prompts(suite)
        return _classified(suite, encoded, list(prompts), _heads(prompts.values(), encoded))[:, None]
    images = images_of(suite, encoded)
    texts = sorted({pair.text for pair in suite.items})
    own = np.array([texts.index(pair.text) for pair in suite.items])
    similarity = images @ np.stack([encoded.texts[text] for text in texts]).T
    to_text = rank_of_best(similarity, own[:, None] == np.arange(len(texts))[None, :])
    to_image = rank_of_best(texts_of(suite, encoded) @ images.T, right_images(suite))
    return np.stack([to_text, to_image], axis=1) < RECALL_AT


def _heads(prompts: Any, encoded: Encoded) -> Vectors:
    """A unit vector for each class, the mean of its prompts', [classes, dim]."""
    heads: Vectors = np.stack([np.mean([encoded.texts[text] for text in texts], axis=0) for texts in prompts])
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    return heads


def _classified(suite: Suite, encoded: Encoded, classes: Sequence[str], heads: Vectors) -> Bools:
    right = np.array([[pair.label == name for name in classes] for pair in suite.items])
    similarity = images_of(suite, encoded) @ heads.T
    ranks: Bools = rank_of_best(similarity, right) == 0
    return ranks
