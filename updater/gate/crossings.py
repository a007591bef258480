"""Measurements of :mod:`updater.gate.cross_version`, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Bridge:
    """An orthogonal map of the incumbent's image vectors into the candidate's space, judged by recall of texts in
    images that it was not fitted on (:mod:`updater.gate.cross_version`)."""

    n: int
    old_old: float
    recall: float
    """Of the candidate's texts in the incumbent's images, mapped."""
    ci_low: float
    """One-sided lower bound of `recall - old_old`."""
    allowed: bool
    """True if a loss of the margin is excluded."""
    matrix: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CrossVersion:
    """Recall at `k` of texts in images, over retrieval suites. `new_old`: the candidate's texts in the incumbent's
    images, as in searches at the start of a backfill (see :mod:`updater.gate.cross_version`)."""

    n: int
    k: int
    old_old: float
    new_old: float
    new_new: float
    ci_low: float
    """One-sided lower bound of `new_old - old_old`."""
    margin: float
    bridge: Bridge | None = None
    """None with too few images to judge one."""

    @property
    def allowed(self) -> bool:
        """True if searches may begin before the backfill: a loss of the margin is excluded."""
        return self.ci_low > -self.margin

    def summary(self) -> dict[str, Any]:
        values = {**asdict(self), "allowed": self.allowed}
        if self.bridge is not None:
            del values["bridge"]["matrix"]
        return values
