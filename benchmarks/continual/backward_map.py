"""Search across versions: a backward map takes features of a release into the space of the one before.

With it new queries find what an index still holds of the old model, while the index is embedded anew behind it
(BC-Aligner; the ridge and Procrustes fits are the closed forms). Maps of several releases compose.

>>> back = fit(new_features, old_features, "procrustes")
>>> back.then(earlier).apply(queries).shape     # two releases back
(100, 256)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.linalg import orthogonal_procrustes

from core.errors import TrainingError
from updater.gate.score import rank_of_best

Rows = NDArray[np.floating]
Method = Literal["ridge", "procrustes"]
SHARES = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class BackwardMap:
    """z_old ~ z_new @ matrix: float64 [dim_new, dim_old]."""

    matrix: NDArray[np.float64]

    def apply(self, features: Rows) -> NDArray[np.float32]:
        """Features [n, dim_new] in the old space, [n, dim_old] of unit length."""
        mapped = np.asarray(features, dtype=np.float64) @ self.matrix
        lengths = np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)
        return np.asarray(mapped / lengths, dtype=np.float32)

    def then(self, earlier: BackwardMap) -> BackwardMap:
        """This map, and after it the one of the release before. Raises TrainingError when they do not meet."""
        if self.matrix.shape[1] != earlier.matrix.shape[0]:
            raise TrainingError(
                f"a map into {self.matrix.shape[1]} dimensions does not meet one from {earlier.matrix.shape[0]}.",
                "Compose the maps of releases that follow each other, the newest first.",
            )
        return BackwardMap(np.asarray(self.matrix @ earlier.matrix))

    def save(self, path: Path) -> None:
        """Write it as safetensors, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        save_file({"matrix": np.ascontiguousarray(self.matrix)}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> BackwardMap:
        """What :meth:`save` wrote. Raises TrainingError when it is damaged."""
        try:
            matrix = load_file(path)["matrix"]
        except (OSError, SafetensorError, KeyError) as error:
            raise TrainingError(f"{path} holds no backward map: {error}.", "Fit it again.") from None
        return cls(matrix.astype(np.float64))


def fit(new: Rows, old: Rows, method: Method = "ridge", ridge: float = 1e-3) -> BackwardMap:
    """The map that takes features [n, dim_new] of some samples to those [n, dim_old] that the old model made of them.

    Args:
        method: ``ridge`` minimises |new B - old|² + ridge n |B|²; ``procrustes`` only turns (and mirrors) the space,
            so that similarities within it stay, and needs equal dimensions.
        ridge: per sample, so that it means the same for any number of samples.

    Raises TrainingError when the shapes do not go together, a value is not finite, or the method is unknown.
    """
    z_new, z_old = (np.asarray(side, dtype=np.float64) for side in (new, old))
    if z_new.ndim != 2 or z_old.ndim != 2 or len(z_new) != len(z_old) or not len(z_new):
        raise TrainingError(
            f"features {z_new.shape} and {z_old.shape} are no pairs.", "Give both models' features of the same samples."
        )
    if not (np.isfinite(z_new).all() and np.isfinite(z_old).all()):
        raise TrainingError("a feature is not finite.", "Look at the release that made it.")
    if method == "procrustes":
        if z_new.shape != z_old.shape:
            raise TrainingError(
                f"procrustes maps {z_new.shape[1]} dimensions to as many, not to {z_old.shape[1]}.", "Use ridge."
            )
        return BackwardMap(np.asarray(orthogonal_procrustes(z_new, z_old)[0], dtype=np.float64))
    if method != "ridge" or not ridge > 0:
        raise TrainingError(
            f"there is no fit {method!r} with ridge {ridge}.", "Use ridge with a value above 0, or procrustes."
        )
    gram = z_new.T @ z_new + ridge * len(z_new) * np.eye(z_new.shape[1])
    return BackwardMap(np.asarray(np.linalg.solve(gram, z_new.T @ z_old), dtype=np.float64))


def composed(maps: Sequence[BackwardMap]) -> BackwardMap:
    """The maps of releases that follow each other, the newest first, as one. Raises TrainingError for none."""
    if not maps:
        raise TrainingError("there is no backward map to compose.", "Give at least one.")
    whole = maps[0]
    for earlier in maps[1:]:
        whole = whole.then(earlier)
    return whole


@dataclass(frozen=True)
class Index:
    """What an index holds of the same n images: their vectors by the old model and by the new one."""

    old: Rows
    new: Rows
    seed: int = 0

    def backfilled(self, share: float) -> NDArray[np.bool_]:
        """Which rows hold new vectors, [n]: a random share of them, and of a larger share all of a smaller one."""
        order = np.random.default_rng(self.seed).permutation(len(self.old))
        done = np.zeros(len(self.old), dtype=bool)
        done[order[: round(share * len(self.old))]] = True
        return done


def recall(queries: Rows, rows: Rows, right: NDArray[np.bool_], k: int) -> float:
    """Share of queries [m, dim] with a right row among the k most similar of [n, dim]; ``right`` is [m, n]."""
    return _share(np.asarray(queries) @ np.asarray(rows).T, right, k)


def recall_while_backfilling(
    queries: Rows,
    index: Index,
    right: NDArray[np.bool_],
    *,
    back: BackwardMap | None = None,
    k: int = 5,
    shares: Sequence[float] = SHARES,
) -> Mapping[float, float]:
    """Recall of new queries at each share of backfill; at share 0 it is M(new query, old index).

    Args:
        queries: by the new model, [m, dim], of unit length, as everything in the index.
        right: which rows answer which query, bool [m, n].
        back: takes queries to what is not backfilled yet; without one they are compared with it as they are.
    """
    across = back.apply(queries) if back else np.asarray(queries)
    old, new = across @ np.asarray(index.old).T, np.asarray(queries) @ np.asarray(index.new).T
    return {share: _share(np.where(index.backfilled(share)[None], new, old), right, k) for share in shares}


def _share(similarity: NDArray[np.floating], right: NDArray[np.bool_], k: int) -> float:
    return float((rank_of_best(similarity, right) < k).mean())
