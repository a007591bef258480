"""Baselines that train nothing: what a method has to beat, for a benchmark.

>>> means = NearestMean()
>>> means.update(features, ["cat", "dog", "cat"])
>>> means.predict(features[:1])
['cat']
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from core.errors import TrainingError


class NearestMean:
    """Nearest class mean on frozen features (iCaRL's classifier, Rebuffi et al. 2017; SimpleCIL, Zhou et al. 2023).

    Learns update by update and forgets nothing: sums are kept in float64, so that any order of updates, and all
    samples at once, come to the same means. Features and means count by their direction, as everywhere in a CLIP.
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    @property
    def classes(self) -> list[str]:
        """Every class seen so far, sorted."""
        return sorted(self._sums)

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean of the unit features of each class, [classes, dim], in the order of :attr:`classes`."""
        return np.stack([self._sums[name] / self._counts[name] for name in self.classes])

    def update(self, features: ArrayLike, labels: Sequence[str]) -> None:
        """Learn samples: features [n, dim] of the base's image tower, and a class each; new classes are fine.

        Raises TrainingError when the shapes do not go together, or a feature has no direction.
        """
        unit = _unit(features)
        dim = len(next(iter(self._sums.values()))) if self._sums else unit.shape[1]
        if len(unit) != len(labels) or unit.shape[1] != dim:
            raise TrainingError(
                f"features {unit.shape} do not go with {len(labels)} labels and dimension {dim}.",
                "Give one label for each row of features of one model.",
            )
        for row, label in zip(unit, labels, strict=True):
            self._sums[label] = self._sums.get(label, 0.0) + row
            self._counts[label] = self._counts.get(label, 0) + 1

    def scores(self, features: ArrayLike) -> NDArray[np.float64]:
        """Cosine of each feature with each class's mean, [n, classes]. Raises TrainingError before any update."""
        if not self._sums:
            raise TrainingError("no class was learned yet.", "Call update first.")
        means = self.means
        # A class whose features cancel out has no direction: it is near to nothing.
        directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return np.asarray(_unit(features) @ directions.T)

    def predict(self, features: ArrayLike) -> list[str]:
        """The class whose mean is nearest, of each feature; of equals the first by name."""
        classes = self.classes
        return [classes[best] for best in self.scores(features).argmax(axis=1)]


def _unit(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.atleast_2d(np.asarray(features, dtype=np.float64))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        raise TrainingError("a feature is not finite or 0.", "Look at the image tower that made it.")
    return np.asarray(rows / lengths)
