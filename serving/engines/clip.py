"""The CLIP engine: one base with any number of resident adapters. The gate and the server use this same class."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.errors import AdapterError
from core.priority import yield_cpu
from core.settings import Settings
from serving.engines.adapters import AdapterFiles, check_dim, read_adapter_of
from serving.engines.clip_base import ClipBase, Spaces, load_base
from serving.engines.heads import Head
from serving.engines.layers import ROWS, shell_of
from serving.engines.lora import effective_weights, merge
from serving.engines.precision import choose_precision, make_backend
from serving.engines.processor import GOLDEN_TEXTS, Precision, golden_pixels, usable_cores
from serving.engines.tokens import pad_rows
from serving.engines.torch_backend import SIZES, TorchTowers
from serving.engines.towers import GPU_BUCKET, TextWidths


@dataclass(frozen=True)
class _Resident:
    towers: TorchTowers
    spaces: Spaces
    files: AdapterFiles | None
    """Source of the merged weights; None for the base."""


class ClipEngine:
    """Encodes images and texts under the base or a resident adapter. All methods are thread safe."""

    def __init__(
        self,
        base: ClipBase,
        device: str | torch.device | None = None,
        threads: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Load the base. ``device``: default: a GPU if there is one; ``threads``: torch's on the CPU, for the whole
        process; 0: all cores. Embedding spaces do not depend on ``precision``: vectors stay within its rounding of
        float32's. Raises ConfigError for int8 on a GPU."""
        _set_threads(threads)
        self.base = base
        self.precision = precision
        self.device = _device(device)
        self.tokenizer = base.tokenizer()
        model = base.build_model()
        bucket = GPU_BUCKET if self.device.type == "cuda" else 1
        self.widths = TextWidths.prove(model, self.tokenizer, base.context_length, bucket)
        self._backend = make_backend(precision, base, model, self.device)
        self._model = model
        self._residents: dict[str, _Resident] = {}
        self._changing = threading.Lock()
        self._none = _Resident(self._backend.towers({}), base.spaces, None)
        self._warm(self._none.towers)

    @classmethod
    def of(cls, settings: Settings, base: ClipBase | None = None, threads: int | None = None) -> ClipEngine:
        """The base and precision that the settings name. Raises BaseModelError, ConfigError."""
        base = base or load_base(settings.home, settings.base.clip)
        if threads is None:
            threads = settings.serve.encoder_threads or max(1, usable_cores() // settings.serve.encoder_replicas)
        _set_threads(threads)
        return cls(base, None, threads, choose_precision(base, settings.serve, settings.home, _device(None)))

    def load(self, name: str, directory: Path | str) -> Spaces:
        """Make an adapter resident and return its spaces; loading it again changes nothing. Raises
        :class:`AdapterError` when the directory is damaged, has another name, or fits another base."""
        with self._changing:
            there = self._residents.get(name)
            if there is not None:
                return there.spaces
            files = read_adapter_of(self.base, name, directory)
            check_dim(files, self.base.dim)
            digests, converted = {}, {}
            for changed in merge(files, self._model):
                digests[changed.name] = changed.digest
                converted[changed.name] = self._backend.convert(changed.name, changed.weight)
                yield_cpu()
            spaces = self.base.spaces_with(digests)
            towers = self._backend.towers(converted)
            if self.device.type == "cuda":
                self._warm(towers)  # each adapter has its own CUDA graphs; on a CPU the kernels are warm by now
            # A new dict, so that readers need no lock.
            self._residents = self._residents | {name: _Resident(towers, spaces, files)}
            return spaces

    def unload(self, name: str) -> None:
        """Forget an adapter. Running calls finish with it, later ones raise. Unknown names are ignored."""
        with self._changing:
            self._residents = {key: value for key, value in self._residents.items() if key != name}

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(sorted(self._residents))

    @property
    def logit_scale(self) -> float:
        """Factor from cosine to logit (already exponentiated)."""
        return float(torch.as_tensor(self._model.logit_scale).detach().exp().reshape(-1)[0])

    def spaces(self, adapter: str | None = None) -> Spaces:
        return self._get(adapter).spaces

    def heads(self, adapter: str | None = None) -> Mapping[str, Head]:
        files = self._get(adapter).files
        return {} if files is None else files.heads

    def model(self, adapter: str | None = None) -> nn.Module:
        """The merged model in float32 and eval mode. Read only: adapters share its tensors."""
        files = self._get(adapter).files
        return shell_of(self._model, {} if files is None else effective_weights(files, self._model))

    def encode_images(self, pixels: np.ndarray, adapter: str | None = None) -> np.ndarray:
        """``float32 [n, dim]`` of unit length from ``uint8 [n, size, size, 3]`` (see ``Preprocess.pixels``)."""
        return _unit(self._raw_images(self._get(adapter), pixels))

    def encode_texts(self, texts: Sequence[str], adapter: str | None = None) -> np.ndarray:
        """``float32 [n, dim]`` of unit length."""
        return self.encode_tokens(self.tokenizer.rows(list(texts)), adapter)

    def encode_tokens(self, rows: Sequence[Sequence[int]], adapter: str | None = None) -> np.ndarray:
        """``float32 [n, dim]`` of unit length from n rows of token ids (see ``Tokenizer.rows``)."""
        return _unit(self._raw_texts(self._get(adapter), rows))

    def golden(self, adapter: str | None = None) -> dict[str, Any]:
        """Run fixed inputs through both towers, the check of a replica before it serves an adapter. Returns spaces,
        mean lengths before normalisation and the cosines ``[image][text]`` to 4 decimals. Raises :class:`AdapterError`
        when a vector is not finite or has zero length."""
        resident = self._get(adapter)
        # One at a time, yielding the CPU between them: adapters load while requests are answered.
        images = _stack(self._raw_images(resident, image[None]) for image in golden_pixels(self.base.preprocess.size))
        texts = _stack(self._raw_texts(resident, [row]) for row in self.tokenizer.rows(list(GOLDEN_TEXTS)))
        for tower, raw in (("image", images), ("text", texts)):
            lengths = np.linalg.norm(raw, axis=1)
            if not np.isfinite(raw).all() or not (lengths > 1e-6).all():
                raise AdapterError(
                    f"{adapter or 'The base'}: the {tower} tower answers golden inputs with values that are "
                    "not finite or vanish.",
                    "Do not release it; look at the training run.",
                )
        return {
            "adapter": adapter,
            "image_space": resident.spaces.image,
            "text_space": resident.spaces.text,
            "image_norm": round(float(np.linalg.norm(images, axis=1).mean()), 4),
            "text_norm": round(float(np.linalg.norm(texts, axis=1).mean()), 4),
            "cosines": [[round(float(v), 4) for v in row] for row in _unit(images) @ _unit(texts).T],
        }

    def _get(self, adapter: str | None) -> _Resident:
        if adapter is None:
            return self._none
        resident_adapter = self._residents.get(adapter)
        if resident_adapter is None:
            raise AdapterError(
                f"Adapter {adapter} is not resident (resident: {', '.join(self.resident) or 'none'}).", "Load it first."
            )
        return resident_adapter

    def _warm(self, towers: TorchTowers) -> None:
        """Run the shapes of requests: the first call with a shape chooses kernels and captures a CUDA graph."""
        size = self.base.preprocess.size
        for count in SIZES if self.device.type == "cuda" else (1,):
            towers.images(np.zeros((count, size, size, 3), np.uint8))
            for width in sorted({self.widths.width(length) for length in (8, 16, 24)}):
                towers.texts(torch.zeros(count, width, dtype=torch.long))

    def _raw_images(self, resident: _Resident, pixels: np.ndarray) -> np.ndarray:
        self.base.preprocess.check(pixels)
        return resident.towers.images(pixels) if len(pixels) else np.zeros((0, self.base.dim), np.float32)

    def _raw_texts(self, resident: _Resident, rows: Sequence[Sequence[int]]) -> np.ndarray:
        vectors = np.zeros((len(rows), self.base.dim), np.float32)
        for width, indices in self.widths.passes([len(row) for row in rows], ROWS):
            ids = pad_rows([rows[index] for index in indices], width, self.tokenizer.pad_id)
            vectors[indices] = resident.towers.texts(ids)
        return vectors


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads or usable_cores())


def _stack(vectors: Iterable[np.ndarray]) -> np.ndarray:
    rows = []
    for vector in vectors:
        rows.append(vector)
        yield_cpu()
    return np.concatenate(rows)


def _unit(raw: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    unit: np.ndarray = (raw / np.maximum(lengths, 1e-12)).astype(np.float32, copy=False)
    return unit
