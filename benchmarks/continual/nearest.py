"""The training-free baseline: nearest class means on the base's features ("SimpleCIL", Zhou et al. 2023).

It learns only labelled updates and answers only classification suites, where training has to beat it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.continual.evaluation import Bools, Encoded, Evaluator, images_of
from benchmarks.continual.stream import Stream, Suite
from core.errors import TrainingError

NAME = "nearest-mean"


class NearestMean:
    """Nearest class mean on frozen features (iCaRL's classifier, Rebuffi et al. 2017).

    Learns update by update without forgetting: sums are kept in float64, so that any order of updates, and all samples
    at once, yield the same means. Features and means are normalised, as everywhere in a CLIP.

    >>> means = NearestMean()
    >>> means.update(features, ["cat", "dog", "cat"])
    >>> means.predict(features[:1])
    ['cat']
    """

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, int] = {}

    @property
    def classes(self) -> list[str]:
        return sorted(self._sums)

    def update(self, features: ArrayLike, labels: Sequence[str]) -> None:
        """Learn samples: features [n, dim] of the base's image tower, and a class each.

        Raises TrainingError when a feature has no direction.
        """
        for row, label in zip(_unit(features), labels, strict=True):
            self._sums[label] = self._sums.get(label, 0.0) + row
            self._counts[label] = self._counts.get(label, 0) + 1

    def scores(self, features: ArrayLike) -> NDArray[np.float64]:
        """Cosine of each feature with the mean of each of :attr:`classes`, [n, classes]."""
        means = np.stack([self._sums[name] / self._counts[name] for name in self.classes])
        # A class whose features cancel out has no direction: it is near to nothing.
        directions = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        return np.asarray(_unit(features) @ directions.T)

    def predict(self, features: ArrayLike) -> list[str]:
        """The class with the nearest mean for each feature; ties go to the first by name."""
        classes = self.classes
        return [classes[best] for best in self.scores(features).argmax(axis=1)]


def _unit(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.atleast_2d(np.asarray(features, dtype=np.float64))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 0).all():
        raise TrainingError("a feature is not finite or 0.", "Look at the image tower that made it.")
    return np.asarray(rows / lengths)


def nearest_means(evaluator: Evaluator, stream: Stream, base: Encoded) -> dict[str, Bools]:
    """By adaptation suite with classes: whether each item was answered correctly after all updates, bool [n, 1].

    One classifier learns all labelled updates; an item's class is chosen among those of its suite.
    """
    means, taught = NearestMean(), []
    for suite in stream.suites:
        pairs = [pair for pair in stream.updates.get(suite.name, ()) if pair.label]
        if suite.task == "classification" and pairs:
            means.update(evaluator.features([pair.read() for pair in pairs]), [pair.label for pair in pairs])
            taught.append(suite)
    return {suite.name: _right(suite, means, base)[:, None] for suite in taught}


def _right(suite: Suite, means: NearestMean, base: Encoded) -> Bools:
    scores = means.scores(images_of(suite, base))
    own = {pair.label for pair in suite.items}
    allowed = np.array([name in own for name in means.classes])
    chosen = np.where(allowed, scores, -np.inf).argmax(axis=1)
    return np.array([means.classes[best] == pair.label for best, pair in zip(chosen, suite.items, strict=True)])
