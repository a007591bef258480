"""Calibration of a release's similarities to probabilities of a match, by kind of query.

The probability is of a hit: the share of matches among hits of that similarity, when each held-out query was asked of
the held-out pictures and its first ten hits were compared with what is known of them (:mod:`updater.gate.calibration`).
A similarity of 0.3 means another thing in every embedding space; a probability of 0.8 means the same in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["text", "label", "image"]
"""Of a query: a caption asked of pictures, a class asked of a picture, a picture asked of pictures."""
MOST_ERROR: Final = 0.05
"""Upper bound of the expected calibration error up to which probabilities may decide (`min_probability`)."""


@dataclass(frozen=True, slots=True)
class MatchCurve:
    """A monotone function from cosine similarity to the probability of a match, by its knots, at most 64."""

    similarity: tuple[float, ...]
    probability: tuple[float, ...]
    queries: int
    pairs: int
    matches: int
    error: float
    """Expected calibration error, on queries that a curve was not fitted on."""
    ci_low: float
    ci_high: float
    """The interval holds 90%."""

    @property
    def bounded(self) -> bool:
        """True if an error above :data:`MOST_ERROR` is excluded."""
        return self.ci_high <= MOST_ERROR

    def __call__(self, similarity: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Probabilities, of the shape of the similarities; NaN for NaN. Linear between knots, constant beyond."""
        asked = np.asarray(similarity, np.float64)
        values = np.interp(asked, self.similarity, self.probability)
        return np.where(np.isnan(asked), np.nan, values)  # of one knot interp makes its value of NaN, too


@dataclass(frozen=True, slots=True)
class Calibration:
    curves: Mapping[Kind, MatchCurve] = field(default_factory=dict)
    """A kind is missing where too few held-out pairs show it."""
    lengths: tuple[int, ...] = ()
    """To which vectors can be cut, because the gate's suites stay within their margins; the longest first."""


def shortened(vectors: npt.NDArray[np.float32], length: int | None) -> npt.NDArray[np.float32]:
    """The first ``length`` numbers of vectors [n, dim], of unit length again. None, or all of them: the vectors."""
    if length in (None, vectors.shape[1]):
        return vectors
    first = vectors[:, :length]
    return np.asarray(first / np.linalg.norm(first, axis=1, keepdims=True).clip(1e-12), np.float32)


def calibration_key(image_space: str, text_space: str) -> str:
    """Where the artifacts have the calibration of two spaces."""
    return f"calibrations/{image_space}-{text_space}.json"


def dump_calibration(found: Calibration) -> bytes:
    curves = {kind: asdict(curve) for kind, curve in found.curves.items()}
    return json.dumps({**curves, "lengths": found.lengths}, allow_nan=False).encode()


def parse_calibration(data: bytes) -> Calibration:
    """Raises ValueError or TypeError for what :func:`dump_calibration` did not write."""
    found = json.loads(data)
    lengths = tuple(found.pop("lengths", ()))  # missing in artifacts of before lengths were measured
    curves = {
        kind: MatchCurve(
            **{**curve, "similarity": tuple(curve["similarity"]), "probability": tuple(curve["probability"])}
        )
        for kind, curve in found.items()
    }
    return Calibration(curves, lengths)
