"""Where the right answer stands among all of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rank_of_best(similarity: NDArray[np.floating], right: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many wrong answers do not score below the best right one. Both arrays have shape [n, choices].

    "Not below" and not "above": a tie or a NaN on either side counts against the model.
    """
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    ranks: NDArray[np.int32] = (~(similarity < best) & ~right).sum(axis=1, dtype=np.int32)
    return ranks
