"""Paired tests, their intervals, and corrections for multiple tests. All tests are one-sided. `before` and `after` are
means over the same items; a difference is `after - before`. There are two kinds of outcome:

- *Accuracy*: one 0/1 per item. Non-inferiority uses Tango's score test for a paired difference of proportions
  (Statistics in Medicine 17, 1998, 891-908) and the interval that inverts it; superiority the exact McNemar test.
- *Clusters*: numbers in [0, 1], one for each way in which an item is asked, of items that may depend on each other (a
  shared caption, or questions about one image). Whole clusters are resampled by a studentised bootstrap of the mean
  over items, a ratio of two sums (Cochran, Sampling Techniques, 1977, 6.4). Independent items with one outcome of 0 or
  1 are tested as an accuracy.

Ranks are tested on 1/log2(2 + rank), the gain of a single right answer in DCG (Jarvelin and Kekalainen, ACM TOIS 20,
2002): few items cross the k-th place of recall@k, and 100 items say with it what 260 say of recall@5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]

RESAMPLES = 20_000
"""Minimum bootstrap draws; the smallest p value is 1 / (draws + 1)."""

PSEUDO = 0.5
"""Half an item is added at -1 and at +1 before resampling, as Agresti and Min (2005) do for paired proportions: without
any disagreement the plain bootstrap would claim certainty from any number of items. For graded outcomes it is added at
the largest observed difference (`reach`): at +-1 it would hide what 50 items show of a rank statistic, and at the
differences' root mean square a test at 3% would be one at 6% (both by simulation)."""

CELLS = 250_000
"""Numbers in a chunk of draws: 2 MB, which fit a core's cache. Chunks of 32 MB take ten times as long."""
POWER = 0.8
"""Power of a test, as usual in trials: 0.9 would take a third more items."""
SMALLEST_REACH = 1e-6
MAX_RESAMPLES = 400_000
"""Maximum draws (a second or two, and 50 MB)."""
BEYOND, BEYOND_SHARE = 25.0, 2.0
"""Draws beyond a level: p is then known to a fifth of itself, and can be reached if tests share the level."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired comparison of two models on the same items; all p values and bounds are one-sided."""

    n: int
    before: float
    after: float
    difference: float
    margin: float
    p_noninferior: float
    """H0: the loss is at least `margin`."""
    p_superior: float
    """H0: there is no gain."""
    p_worse: float
    """H0: there is no loss."""
    method: str
    spread: float
    """Standard deviation of one item's difference."""
    bounds: Callable[[float], tuple[float, float]]
    """Lower and upper bound of the difference, each missed with at most the given probability."""
    units: int
    resample: Callable[[], Bootstrap]

    @property
    def unit_spread(self) -> float:
        return self.spread * math.sqrt(self.units / self.n)

    def needed(self, level: float) -> int:
        """Items that would show non-inferiority at `level` with POWER if nothing had changed."""
        return items_needed(self.spread, self.margin, level)


def tango_z(gained: int, lost: int, n: int, difference: float) -> float:
    """Tango's score statistic for H0: p(after) - p(before) = difference; positive if the data are above it. `gained`
    items went from wrong to right, `lost` the other way, of `n` in all."""
    a = 2.0 * n
    b = -gained - lost + (2.0 * n - gained + lost) * difference
    c = -lost * difference * (1.0 - difference)
    lost_share = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    variance = n * (2.0 * lost_share + difference * (1.0 - difference))
    excess = gained - lost - n * difference
    if variance <= 0.0:
        return 0.0 if excess == 0.0 else math.copysign(math.inf, excess)
    return excess / math.sqrt(variance)


def tango_interval(gained: int, lost: int, n: int, level: float) -> tuple[float, float]:
    """The two one-sided bounds at `level` of the paired difference: together a 1 - 2*level interval."""
    z = float(stats.norm.isf(level))
    edge = 1.0 - 1e-9
    observed = (gained - lost) / n

    def low(d: float) -> float:
        return tango_z(gained, lost, n, d) - z

    def high(d: float) -> float:
        return tango_z(gained, lost, n, d) + z

    lower = -1.0 if low(-edge) <= 0.0 else float(optimize.brentq(low, -edge, observed, xtol=1e-9))
    upper = 1.0 if high(edge) >= 0.0 else float(optimize.brentq(high, observed, edge, xtol=1e-9))
    return lower, upper


def mcnemar_superior(gained: int, lost: int) -> float:
    """Exact one-sided McNemar: P(at least `gained` of the items that changed, changed for the better | fair coin)."""
    return float(stats.binom.sf(gained - 1, gained + lost, 0.5)) if gained + lost else 1.0


def reciprocal_log_rank(ranks: NDArray[np.integer]) -> Floats:
    """1/log2(2 + rank) of 0-based ranks: 1 for a right answer, 0.5 at rank 2, near 0 far down."""
    return np.asarray(1.0 / np.log2(2.0 + ranks), dtype=np.float64)


def compare_accuracy(
    before: Floats, after: Floats, *, margin: float, level: float = 0.05, tests: int = 1, seed: int = 0
) -> Comparison:
    """Compare two aligned 0/1 vectors of shape [n]. Raises ValueError otherwise."""
    _check(before, after)
    if not (np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all()):
        raise ValueError("accuracy compares 0/1 outcomes")
    n = len(before)
    gained = int(np.sum(after > before))
    lost = int(np.sum(after < before))
    return Comparison(
        n=n,
        before=float(before.mean()),
        after=float(after.mean()),
        difference=(gained - lost) / n,
        margin=margin,
        p_noninferior=float(stats.norm.sf(tango_z(gained, lost, n, -margin))),
        p_superior=mcnemar_superior(gained, lost),
        p_worse=mcnemar_superior(lost, gained),
        method="Tango score test, exact McNemar",
        spread=math.sqrt((gained + lost + 2 * PSEUDO) / (n + 2 * PSEUDO)),
        bounds=lambda level: tango_interval(gained, lost, n, level),
        units=n,
        resample=cache(lambda: bootstrap(after - before, seed=seed, draws=_draws(level, tests))),
    )


def compare_clusters(
    before: Floats,
    after: Floats,
    clusters: NDArray[np.int_] | None = None,
    *,
    margin: float,
    level: float,
    tests: int = 1,
    seed: int = 0,
    graded: bool = False,
) -> Comparison:
    """Compare two aligned outcome arrays of shape [n] or [n, views] in [0, 1]. ``clusters`` [n]: items with the same
    number are resampled together; None: all items are independent. ``level``: of the later test; it determines the
    number of draws. ``tests``: how many may share that level (Holm, Bonferroni). ``graded``: outcomes are not hits and
    misses, but numbers that nearly every item changes (a rank statistic). Raises ValueError: the arrays do not align.
    """
    _check(before, after)
    first = before.reshape(len(before), -1)
    second = after.reshape(len(after), -1)
    index = np.arange(len(first)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if len(index) != len(first):
        raise ValueError(f"{len(index)} clusters for {len(first)} items")
    units = int(index.max()) + 1
    alone = units == len(first)
    if alone and first.shape[1] == 1 and bool(np.isin([first, second], (0.0, 1.0)).all()):
        return compare_accuracy(first[:, 0], second[:, 0], margin=margin, level=level, tests=tests, seed=seed)
    own_first, own_second = first.mean(axis=1), second.mean(axis=1)
    sums = np.bincount(index, weights=own_second - own_first).astype(np.float64)
    sizes = np.bincount(index).astype(np.float64)
    reach = max(float(np.abs(sums / sizes).max()), SMALLEST_REACH) if graded else 1.0
    boot = bootstrap(sums, sizes, reach=reach, seed=seed, draws=_draws(level, tests))
    method = f"studentised bootstrap over {'items' if alone else 'clusters'}"
    means = float(own_first.mean()), float(own_second.mean())
    return _compared(means, boot, len(first), units, margin, method)


def pool(strata: Sequence[Comparison], margin: float) -> Comparison:
    """Mean over strata weighted by their units, with the weighted sum of their variances. A single stratum is its own
    pool. The strata must have been compared at one `level` and with different seeds."""
    if len(strata) == 1 and strata[0].margin == margin:
        return strata[0]
    units = sum(stratum.units for stratum in strata)
    shares = [stratum.units / units for stratum in strata]
    means = (
        sum(share * stratum.before for share, stratum in zip(shares, strata, strict=True)),
        sum(share * stratum.after for share, stratum in zip(shares, strata, strict=True)),
    )
    boot = stratified([stratum.resample() for stratum in strata], shares)
    n = sum(stratum.n for stratum in strata)
    return _compared(means, boot, n, units, margin, f"stratified studentised bootstrap, {len(strata)} strata")


def _compared(
    means: tuple[float, float], boot: Bootstrap, n: int, units: int, margin: float, method: str
) -> Comparison:
    return Comparison(
        n=n,
        before=means[0],
        after=means[1],
        difference=boot.difference,
        margin=margin,
        p_noninferior=boot.p_above(-margin),
        p_superior=boot.p_above(0.0),
        p_worse=boot.p_below(0.0),
        method=method,
        spread=boot.error * math.sqrt(n),
        bounds=lambda level: (boot.low(level), boot.high(level)),
        units=units,
        resample=lambda: boot,
    )


def items_needed(spread: float, margin: float, level: float, power: float = POWER) -> int:
    """Items with which a one-sided test at `level` detects a distance of `margin` with `power`. `spread` is the
    standard deviation of one item's difference."""
    if margin <= 0.0:
        return 0
    return math.ceil((_reach(level, power) * spread / margin) ** 2)


def smallest_difference(spread: float, items: int, level: float, power: float = POWER) -> float:
    """Inverse of :func:`items_needed`: the distance that a test detects with ``items``."""
    return _reach(level, power) * spread / math.sqrt(max(items, 1))


def _reach(level: float, power: float) -> float:
    """Standard errors between a hypothesis and a distance detected with `power`."""
    return float(stats.norm.isf(level) + stats.norm.ppf(power))


def holm(p_values: list[float], level: float) -> list[tuple[bool, float]]:
    """Holm's step-down: for each hypothesis whether it is rejected, and the level at which it was tested. After the
    first that is not rejected, none is; these are reported at the level where the procedure stopped, so that an
    interval at a suite's level always agrees with its decision."""
    found = [(False, level)] * len(p_values)
    going, local = True, level
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if going:
            local = level / (len(p_values) - rank)
            going = p_values[i] <= local
        found[i] = (going, local)
    return found


@lru_cache(maxsize=64)
def _draws(level: float, tests: int) -> int:
    """Draws so that BEYOND of them are beyond `level`, and BEYOND_SHARE beyond its part for each of `tests` that share
    it; RESAMPLES if MAX_RESAMPLES would not reach the level."""
    if level * MAX_RESAMPLES < 1.0:
        return RESAMPLES
    return int(min(MAX_RESAMPLES, max(RESAMPLES, math.ceil(max(BEYOND, BEYOND_SHARE * tests) / level))))


def _check(before: Floats, after: Floats) -> None:
    if before.shape != after.shape or len(before) == 0:
        raise ValueError(f"outcomes do not align: {before.shape} and {after.shape}")


@dataclass(frozen=True)
class Bootstrap:
    """Studentised bootstrap distribution of a mean difference: each draw is divided by its own standard error."""

    difference: float
    error: float
    moves: Floats
    """[draws]: each draw's mean minus the resampled mean."""
    errors: Floats
    """[draws]: each draw's own standard error."""

    @cached_property
    def pivots(self) -> Floats:
        return np.sort(self.moves / self.errors)

    def p_above(self, value: float) -> float:
        """One-sided p of H0: the difference is at most `value`."""
        t = (self.difference - value) / self.error
        beyond = len(self.pivots) - int(np.searchsorted(self.pivots, t, side="left"))
        return (beyond + 1) / (len(self.pivots) + 1)

    def p_below(self, value: float) -> float:
        """One-sided p of H0: the difference is at least `value`."""
        t = (self.difference - value) / self.error
        beyond = int(np.searchsorted(self.pivots, t, side="right"))
        return (beyond + 1) / (len(self.pivots) + 1)

    def low(self, level: float) -> float:
        """Lower one-sided bound: the smallest value that `p_above` does not reject at `level`."""
        count = len(self.pivots)
        beyond = math.floor(level * (count + 1)) - 1  # draws that may lie at or beyond the bound
        pivot = self.pivots[count - 1 - max(beyond, 0)]
        return max(self.difference - float(pivot) * self.error, -1.0)

    def high(self, level: float) -> float:
        count = len(self.pivots)
        beyond = math.floor(level * (count + 1)) - 1
        return min(self.difference - float(self.pivots[max(beyond, 0)]) * self.error, 1.0)


def bootstrap(
    sums: Floats, sizes: Floats | None = None, *, reach: float = 1.0, seed: int = 0, draws: int = RESAMPLES
) -> Bootstrap:
    """Resample clusters with replacement; deterministic for a seed. `sums` [clusters] are the summed differences of a
    cluster's items, and `sizes` [clusters] the numbers of its items (default 1). The difference is sum(sums) /
    sum(sizes). `reach` is the difference at which half an item is added, see PSEUDO."""
    n = len(sums)
    ones = np.ones(n) if sizes is None else sizes
    usual = float(ones.mean())
    pairs = np.concatenate([np.stack([sums, ones], axis=1), [[-reach * usual, usual], [reach * usual, usual]]])
    values, index = np.unique(pairs, axis=0, return_inverse=True)
    index = index.reshape(-1)
    pseudo = index[-2:]
    observed = np.bincount(index, minlength=len(values)).astype(np.float64)
    observed[pseudo] -= 1.0 - PSEUDO  # the two appended clusters weigh half a cluster each
    total, size = values[:, 0], values[:, 1]
    share = observed / observed.sum()
    centre = float(share @ total) / float(share @ size)
    error = math.sqrt(float(share @ (total - centre * size) ** 2) / n) / float(share @ size)
    moments = np.stack([total, size, total**2, total * size, size**2], axis=1)
    drawn = _sums(moments, index, share, n, seed, draws)
    moves = drawn[:, 0] / drawn[:, 1] - centre
    smooth = (drawn + PSEUDO * moments[pseudo].sum(axis=0)) / (n + 2 * PSEUDO)
    mean = smooth[:, 0] / smooth[:, 1]
    squares = smooth[:, 2] - 2 * mean * smooth[:, 3] + mean**2 * smooth[:, 4]
    errors = np.sqrt(np.maximum(squares, 1e-30) / n) / smooth[:, 1]
    return Bootstrap(difference=float(sums.sum() / ones.sum()), error=error, moves=moves, errors=errors)


def stratified(strata: Sequence[Bootstrap], weights: Sequence[float]) -> Bootstrap:
    """Weighted mean of the differences of independently drawn strata, with as many draws each. The variances of strata
    add up, weighted by the squared weights (Cochran, Sampling Techniques, 1977, 5.3)."""
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    return Bootstrap(
        difference=float(shares @ [each.difference for each in strata]),
        error=math.sqrt(float(shares**2 @ [each.error**2 for each in strata])),
        moves=shares @ np.stack([each.moves for each in strata]),
        errors=np.sqrt(shares**2 @ np.stack([each.errors for each in strata]) ** 2),
    )


def _sums(moments: Floats, index: NDArray[np.int_], share: Floats, n: int, seed: int, draws: int) -> Floats:
    """Sums of `moments` [values, 5] over `n` drawn clusters: [draws, 5]. A draw is a multinomial count of the distinct
    values. If there are few, it is drawn as such; if nearly every cluster has its own, drawing the clusters and
    counting them is several times faster."""
    rng = np.random.default_rng(seed)
    count = len(moments)
    few = 5 * count < n
    chunk = max(1, CELLS // (count if few else n))
    # 2n + 2 equal lots: two for each cluster, one for each of the two appended ones
    value_of_lot = np.concatenate([np.repeat(index[:n], 2), index[n:]])
    width = np.uint16 if len(value_of_lot) <= np.iinfo(np.uint16).max else np.int64
    parts = []
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        if few:
            counts = rng.multinomial(n, share, size=rows)
        else:
            lots = rng.integers(len(value_of_lot), size=(rows, n), dtype=width)
            places = value_of_lot[lots] + count * np.arange(rows)[:, None]
            counts = np.bincount(places.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(counts.astype(np.float64) @ moments)
    return np.concatenate(parts)
