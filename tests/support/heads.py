from __future__ import annotations

import numpy as np

from serving.engines.heads import Head


def random_head(dim: int, seed: int = 0) -> Head:
    """Three classes around random points, and a covariance that is not a multiple of the identity."""
    random = np.random.default_rng(seed)
    spread = random.normal(size=(dim, dim)) / 3
    means = random.normal(size=(3, dim)).astype(np.float32)
    precision = np.linalg.inv(spread @ spread.T + np.eye(dim)).astype(np.float32)
    return Head(("a", "b", "c"), means, precision, means.mean(axis=0), 0.7, 9.0, (5, 4, 3))
