"""A serving engine that caches, per input, everything below the last blocks, so that a hundred candidates can be
scored.

With adapters in the last blocks only, everything below the *boundary* (also the trainer's) is the same for every
candidate. From there on the effective weights are those of ``ClipEngine``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import AdapterError, ConfigError
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, Spaces
from serving.engines.layers import shell_of
from serving.engines.processor import GOLDEN_TEXTS, golden_pixels
from updater.adapters.trained_layers import Which, tower_blocks
from updater.families.clip_towers import SplitTower, stack_boundaries

TOLERANCE = 1e-4
"""Largest difference of a component of a unit vector from that of the whole tower; rounding causes about 1e-6."""
Towers = dict[Which, SplitTower]


class LateEngine(ClipEngine):
    """A ``ClipEngine`` for adapters that change at most the last ``blocks`` of each tower."""

    def __init__(self, base: ClipBase, blocks: int = 1) -> None:
        """Raises ConfigError when nothing would be left below the last ``blocks`` of a tower."""
        super().__init__(base)
        plain = base.build_model()
        self._cuts: dict[Which, int] = {which: tower_blocks(plain, which)[1] - blocks for which in ("image", "text")}
        if min(self._cuts.values()) < 1:
            raise ConfigError(
                f"base {base.name!r} has no more than {blocks} blocks in a tower, or none that are known.",
                "Use a base whose towers have lists of blocks, such as the shipped one.",
            )
        self._recorders = self._split(None)
        self._towers: dict[str | None, Towers] = {None: self._split(None)}
        self._boundaries: dict[Which, dict[bytes, Tensor]] = {"image": {}, "text": {}}
        self._blank = torch.zeros(1, 3, base.preprocess.size, base.preprocess.size, device=self.device)
        self._one_at_a_time = threading.Lock()

    def load(self, name: str, directory: Path | str) -> Spaces:
        """Load an adapter. Raises AdapterError also when it changes anything below the last blocks."""
        spaces = super().load(name, directory)
        self._towers[name] = self._split(name)
        pixels, texts = golden_pixels(self.base.preprocess.size), list(GOLDEN_TEXTS)
        differences = (
            super().encode_images(pixels, name) - self.encode_images(pixels, name),
            super().encode_texts(texts, name) - self.encode_texts(texts, name),
        )
        if not max(float(np.abs(difference).max()) for difference in differences) <= TOLERANCE:
            self.unload(name)
            raise AdapterError(
                f"Adapter {name} changes blocks before the last ones, whose output is kept.",
                "Train it with fewer blocks (image.blocks, text.blocks), or use ClipEngine.",
            )
        return spaces

    def unload(self, name: str) -> None:
        super().unload(name)
        self._towers.pop(name, None)

    def encode_images(self, pixels: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """As ``ClipEngine``'s, with a cached prefix for known pictures."""
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in pixels]

        def inputs(rows: Sequence[int]) -> Tensor:
            return self.base.preprocess.normalise(pixels[list(rows)], self.device)

        return self._encode("image", keys, inputs, self._blank, None, adapter)

    def encode_texts(self, texts: Sequence[str], adapter: str | None = None) -> np.ndarray:
        ids = self.tokenizer(list(texts)).to(self.device)
        keys = [text.encode() for text in texts]
        return self._encode("text", keys, lambda rows: ids[list(rows)], ids, int(ids.shape[1]), adapter)

    @torch.inference_mode()
    def _encode(
        self,
        which: Which,
        keys: Sequence[bytes],
        inputs: Callable[[Sequence[int]], Tensor],
        stem: Tensor,
        length: int | None,
        adapter: str | None,
    ) -> np.ndarray:
        self._get(adapter)  # raises AdapterError when it is not resident
        with self._one_at_a_time:  # a split tower holds what it resumes from
            known = self._boundaries[which]
            missing = [row for row, key in enumerate(keys) if key not in known]
            if missing:
                boundary = self._recorders[which].record(inputs(missing))[1]
                known.update({keys[row]: output.clone() for row, output in zip(missing, boundary, strict=True)})
            rows = stack_boundaries([known[key] for key in keys], length, self.device)
            vectors: np.ndarray = self._towers[adapter][which].resume(rows, stem).float().cpu().numpy()
        return vectors

    def _split(self, adapter: str | None) -> Towers:
        shell = shell_of(self.model(adapter), {})
        return {which: SplitTower(shell, which, cut) for which, cut in self._cuts.items()}
