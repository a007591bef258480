"""The baseline that trains nothing: nearest class means on the base's features ("SimpleCIL", Zhou et al. 2023).

It learns labelled updates alone, and answers classification suites alone; there it is what training has to beat.
"""

from __future__ import annotations

import numpy as np

from benchmarks.continual.baselines import NearestMean
from benchmarks.continual.evaluation import Bools, Encoded, Evaluator, images_of
from benchmarks.continual.stream import Stream, Suite

NAME = "nearest-mean"


def nearest_means(evaluator: Evaluator, stream: Stream, base: Encoded) -> dict[str, Bools]:
    """By adaptation suite with classes: whether each item was answered rightly after all updates, bool [n, 1].

    One classifier learns all labelled updates; an item's class is looked for among those of its suite.
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
