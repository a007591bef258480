"""Heads: classifiers over an adapter's image space, stored in its directory as ``heads.safetensors``. A head has the
mean of each class and a shared covariance: linear discriminant analysis on frozen features, as in SLCA (Zhang et al.
2023) and RanPAC (McDonnell et al. 2023). It is only valid in that space, so it is released and rolled back with its
adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from core.digests import digest_bytes, digest_json
from core.errors import AdapterError
from core.settings.updates import HEAD_NAME, MAX_HEADS

HEADS = "heads.safetensors"
LEVEL = "/"
"""Separates the levels of hierarchical labels such as ``animal/bird/crane``."""
MAX_CLASSES = 10_000
_ARRAYS = ("means", "precision", "center")
_AGAIN = "Fetch the adapter again, or train it again."

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeadScores:
    """Scores of n images: ``probabilities`` [n, classes] sum to 1; ``alone`` [n, classes]: each class against all
    images together; ``distance`` [n] to the nearest class in units of the threshold: above 1 is none of them."""

    probabilities: Floats
    alone: Floats
    distance: Floats


@dataclass(frozen=True, eq=False)
class Head:
    """Classes in an image space. Arrays are float32: ``means`` [classes, dim], ``precision`` [dim, dim] (inverse of the
    within-class covariance), ``center`` [dim] (mean of all images)."""

    labels: tuple[str, ...]
    means: npt.NDArray[np.float32]
    precision: npt.NDArray[np.float32]
    center: npt.NDArray[np.float32]
    scale: float
    """Factor on discriminants that calibrates probabilities."""
    threshold: float
    """Squared Mahalanobis distance beyond which an image is none of the classes."""
    counts: tuple[int, ...]

    def classify(self, vectors: npt.ArrayLike) -> HeadScores:
        """Classify unit vectors [n, dim] of the head's image space."""
        x = np.asarray(vectors, np.float64)
        precision, weights, own = self._discriminants
        scores = x @ weights.T - 0.5 * own  # [n, classes + 1]; the last column is all images together
        logits = self.scale * scores[:, :-1]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        length = np.einsum("nd,nd->n", x @ precision, x)
        nearest = (length[:, None] - 2 * scores[:, :-1]).min(axis=1)
        contrast = np.clip(self.scale * (scores[:, :-1] - scores[:, -1:]), -60.0, 60.0)
        return HeadScores(
            shares / shares.sum(axis=1, keepdims=True), 1 / (1 + np.exp(-contrast)), nearest / self.threshold
        )

    @cached_property
    def _discriminants(self) -> tuple[Floats, Floats, Floats]:
        """The precision; products of means and center with it [classes + 1, dim]; their squared lengths."""
        points = np.vstack([self.means, self.center[None]]).astype(np.float64)
        precision = self.precision.astype(np.float64)
        weights = points @ precision
        return precision, weights, np.einsum("kd,kd->k", weights, points)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "labels": list(self.labels),
            "scale": self.scale,
            "threshold": self.threshold,
            "counts": list(self.counts),
        }


def backed_off(labels: Sequence[str], probabilities: npt.ArrayLike, confidence: float) -> tuple[str | None, float]:
    """The most specific label, or level of hierarchical labels, with at least this probability, and its probability;
    None if there is none."""
    shares = np.asarray(probabilities, np.float64)
    best = labels[int(shares.argmax())].split(LEVEL)
    for depth in range(len(best), 0, -1):
        level = LEVEL.join(best[:depth])
        under = [label == level or label.startswith(level + LEVEL) for label in labels]
        share = float(shares[np.array(under)].sum())
        if share >= confidence:
            return level, share
    return None, 0.0


def heads_digest(heads: Mapping[str, Head]) -> str:
    """SHA-256 over names, classes and arrays; empty without heads."""
    parts = [
        digest_json(
            [name, head.about, [digest_bytes(np.ascontiguousarray(getattr(head, a)).tobytes()) for a in _ARRAYS]]
        )
        for name, head in sorted(heads.items())
    ]
    return digest_json(parts) if parts else ""


def write_heads(directory: Path, heads: Mapping[str, Head]) -> None:
    arrays = {f"{name}/{a}": np.ascontiguousarray(getattr(head, a)) for name, head in heads.items() for a in _ARRAYS}
    about = {name: head.about for name, head in sorted(heads.items())}
    save_file(arrays, directory / HEADS, metadata={"heads": json.dumps(about)})


def read_heads(directory: Path | str) -> dict[str, Head]:
    """Read the heads of an adapter's directory; empty without a file. Raises AdapterError when the file is invalid."""
    path = Path(directory) / HEADS
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})["heads"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        heads = {name: _head(name, said, arrays) for name, said in about.items()}
        known = {f"{name}/{a}" for name in heads for a in _ARRAYS}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} holds no heads: {type(error).__name__}: {error}"[:300], _AGAIN) from None
    if known != arrays.keys() or len(heads) > MAX_HEADS:
        raise AdapterError(f"{path} holds other arrays than those of its {len(heads)} heads.", _AGAIN)
    return heads


def _head(name: str, about: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Head:
    means, precision, center = (np.asarray(arrays[f"{name}/{a}"]) for a in _ARRAYS)
    labels, counts = tuple(map(str, about["labels"])), tuple(map(int, about["counts"]))
    head = Head(labels, means, precision, center, float(about["scale"]), float(about["threshold"]), counts)
    dim = means.shape[-1]
    wanted = {"means": (len(labels), dim), "precision": (dim, dim), "center": (dim,)}
    if not re.fullmatch(HEAD_NAME, name):
        raise ValueError(f"{name[:70]!r} is not a name of a head")
    if not 2 <= len(labels) <= MAX_CLASSES or len(set(labels)) < len(labels) or len(counts) != len(labels):
        raise ValueError(f"head {name} has {len(labels)} labels, some of them twice or none")
    for a, shape in wanted.items():
        array = getattr(head, a)
        if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"head {name}: {a} is not finite float32 of the shape {shape}")
    if not (np.isfinite([head.scale, head.threshold]).all() and head.scale > 0 and head.threshold > 0):
        raise ValueError(f"head {name}: scale and threshold must be above 0")
    return head
