"""Calibrates similarities to probabilities of a match, from the pairs that held-out queries find.

Each query of a suite is asked of that suite's pictures, as a search or a classification asks it, and its first ten hits
are pairs: a *text* is a caption (a match: a picture with this caption), a *label* a class's prompts asked of a picture
(its class), an *image* a picture asked of the others (one with the same class or concept; pictures without any such
partner are not asked). A curve is a logistic regression (Platt, 1999) on a linear spline with six segments that hold
equal shares of matches and of others, and none of which falls. Isotonic regression has as much error, but its steps are
others in each release: a threshold of probability then moves by chance (docs/benchmarks/gate.md). The expected
calibration error (Naeini et al., AAAI 2015) is judged by halves: queries of one half by the curve of the other.

A probability is that of a hit in a collection like the suites. In one that is a hundred times as large more pictures
reach a similarity by chance, and fewer hits of that probability match.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logit

from core.artifacts import Artifacts
from core.progress import progress_log
from core.settings.updates import Gate
from serving.engines.calibration import Calibration, Kind, MatchCurve, calibration_key, dump_calibration
from updater.gate.score import Scorer
from updater.gate.statistics import Comparison, Floats, compare_clusters, pool
from updater.gate.suites import Role, Suite

HITS: Final = 10
KNOTS: Final = 64
SEGMENTS: Final = 6
LEAST_RISE: Final = 0.01
"""Of the logit over a segment, so that no threshold falls on a plateau."""
FEWEST_QUERIES: Final = 50
FEWEST: Final = 20
"""Fewest matches, and fewest others."""
BINS: Final = 10
"""Of the calibration error, with equal numbers of pairs."""
DRAWS: Final = 500
LEVEL: Final = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Pairs of a query and one of its hits; aligned arrays [n]."""

    similarity: Floats
    match: NDArray[np.bool_]
    query: NDArray[np.int64]
    """Number of the query. Pairs of one query are not independent."""

    def __getitem__(self, chosen: NDArray[Any]) -> Pairs:
        return Pairs(self.similarity[chosen], self.match[chosen], self.query[chosen])

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """Pairs of several suites; each keeps queries of its own."""
        starts = np.cumsum([0, *(int(part.query.max(initial=-1)) + 1 for part in parts)])
        queries = [part.query + start for part, start in zip(parts, starts, strict=False)]
        return cls(
            np.concatenate([part.similarity for part in parts]),
            np.concatenate([part.match for part in parts]),
            np.concatenate(queries),
        )


def first_hits(similarity: NDArray[np.floating], right: NDArray[np.bool_]) -> Pairs:
    """The first hits of each query; both arrays are [queries, choices]. Raises ValueError for what is not finite."""
    if not np.isfinite(similarity).all():
        raise ValueError("similarities are not finite")
    hits = np.argsort(-similarity, axis=1, kind="stable")[:, :HITS]
    query = np.repeat(np.arange(len(similarity)), hits.shape[1])
    flat = hits.reshape(-1)
    return Pairs(similarity[query, flat].astype(np.float64), right[query, flat], query)


def pairs_of(scorer: Scorer, suite: Suite, adapter: str | None) -> Iterator[tuple[Kind, Pairs]]:
    """The pairs that a suite's queries find, by kind. Raises GateError for an unreadable image."""
    items, label = suite.items(), f"{suite.name}, calibration"
    images = scorer.images(items, adapter, label)
    texts = np.array([item.text for item in items])
    if suite.task == "retrieval":
        captions = sorted(set(texts.tolist()))
        asked = scorer.texts(captions, adapter, label)
        yield "text", first_hits(asked @ images.T, np.array(captions)[:, None] == texts[None, :])
        same = np.array([item.concept or item.text for item in items])
    else:
        (classes,) = scorer.choices(suite)
        asked = scorer.class_vectors(suite, classes, adapter, label)
        yield "label", first_hits(images @ asked.T, texts[:, None] == np.array(classes)[None, :])
        same = texts
    sources = np.array([item.source for item in items])
    counted = Counter(same.tolist())
    asking = np.array([counted[each] > 1 for each in same.tolist()])
    if asking.any():
        # A picture does not find itself: it is the last hit, behind all others.
        itself = sources[asking][:, None] == sources[None, :]
        similarity = np.where(itself, -2.0, images[asking] @ images.T)
        found = first_hits(similarity, same[asking][:, None] == same[None, :])
        yield "image", found[found.similarity > -2.0]


def calibrate(scorer: Scorer, suites: Sequence[Suite], adapter: str | None) -> dict[Kind, MatchCurve]:
    """Curves of an adapter (None: the base) by kind, of configured suites where these are enough: those of samples come
    and go, and a curve would move with them. Raises GateError; ValueError for vectors that are not finite."""
    configured, all_suites = defaultdict[Kind, list[Pairs]](list), defaultdict[Kind, list[Pairs]](list)
    for suite in suites:
        for kind, pairs in pairs_of(scorer, suite, adapter):
            all_suites[kind].append(pairs)
            if suite.data:
                configured[kind].append(pairs)
    curves = {
        kind: fit(Pairs.joined(configured[kind] or parts)) or fit(Pairs.joined(parts))
        for kind, parts in all_suites.items()
    }
    return {kind: curve for kind, curve in curves.items() if curve is not None}


def fit(pairs: Pairs) -> MatchCurve | None:
    """A curve with its error; None with too few queries, matches or others to fit one."""
    queries, matches = len(np.unique(pairs.query)), int(pairs.match.sum())
    if queries < FEWEST_QUERIES or min(matches, len(pairs.match) - matches) < FEWEST:
        return None
    error, low, high = calibration_error(pairs, judged_by_halves(pairs))
    return MatchCurve(*knots(pairs), queries, len(pairs.match), matches, error, low, high)


def knots(pairs: Pairs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Similarities and probabilities of a curve, both ascending. One pair of the mean share of matches is added at each
    end of a segment: no number of pairs shows that a probability is 0 or 1."""
    similarity, matches = pairs.similarity, pairs.match.sum()
    mean = (matches + 0.5) / (len(similarity) + 1.0)
    weights = np.where(pairs.match, 1.0 / max(matches, 1), 1.0 / max(len(pairs.match) - matches, 1))
    shares = np.linspace(0.0, 1.0, SEGMENTS + 1)[1:-1]
    inner = np.quantile(similarity, shares, weights=weights, method="inverted_cdf")
    ends = np.unique([similarity.min(), *inner, similarity.max()])
    if len(ends) < 2:
        return (float(ends[0]),), (float(mean),)
    features = _spline(np.concatenate([similarity, ends]), ends)
    wanted = np.concatenate([pairs.match, np.full(len(ends), mean)])

    def loss(coefficients: Floats) -> tuple[float, Floats]:
        """Mean cross-entropy, and its gradient."""
        logits = features @ coefficients
        value = np.mean(np.logaddexp(0.0, logits) - wanted * logits)
        return float(value), features.T @ (expit(logits) - wanted) / len(wanted)

    start = np.array([logit(mean), *np.ones(len(ends) - 1)])
    bounds = [(None, None), *[(LEAST_RISE, None)] * (len(ends) - 1)]
    fitted = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    places = np.interp(np.linspace(0.0, len(ends) - 1, KNOTS), np.arange(len(ends)), ends)
    return tuple(places.tolist()), tuple(expit(_spline(places, ends) @ fitted).tolist())


def _spline(similarity: Floats, ends: Floats) -> Floats:
    """One, and the position in each segment from 0 at its lower end to 1 at its upper end: [n, 1 + segments]."""
    positions = np.clip((similarity[:, None] - ends[:-1]) / np.diff(ends), 0.0, 1.0)
    return np.column_stack([np.ones(len(similarity)), positions])


def judged_by_halves(pairs: Pairs) -> Floats:
    """Probability of each pair by the curve of the queries of the other half."""
    odd = pairs.query % 2 == 1
    given = np.empty(len(odd))
    for half in (odd, ~odd):
        given[half] = np.interp(pairs.similarity[half], *knots(pairs[~half]))
    return given


def calibration_error(pairs: Pairs, given: Floats) -> tuple[float, float, float]:
    """Expected calibration error of probabilities, and a 90% interval: a basic bootstrap over queries (Davison and
    Hinkley, 1997, 5.2), since each draw adds as much error by chance as the pairs themselves have."""
    order = np.argsort(given, kind="stable")
    bins = np.empty(len(order), np.int64)
    bins[order] = np.arange(len(order)) * BINS // len(order)
    query = np.unique(pairs.query, return_inverse=True)[1]
    excess = np.zeros((query.max() + 1, BINS))
    np.add.at(excess, (query, bins), pairs.match - given)
    sizes = np.bincount(query).astype(np.float64)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(sizes), np.full(len(sizes), 1.0 / len(sizes)), size=DRAWS).astype(np.float64)
    error = float(np.abs(excess.sum(axis=0)).sum() / sizes.sum())
    errors = np.abs(drawn @ excess).sum(axis=1) / (drawn @ sizes)
    low, high = np.quantile(errors, [LEVEL, 1.0 - LEVEL])
    return error, max(0.0, 2 * error - float(high)), min(1.0, max(error, 2 * error - float(low)))


def kept_lengths(scorer: Scorer, suites: Sequence[Suite], adapter: str | None, settings: Gate) -> tuple[int, ...]:
    """A half, a quarter and an eighth of a vector's length, as far as no retention suite, nor those of new data pooled,
    lose their margin, by the gate's test of non-inferiority. The longest is tested first and the first that fails ends
    it, so each has the full level (fixed sequence: Maurer, Hothorn and Lehmacher, 1995). Heads take whole vectors."""
    lengths = [scorer.engine.base.dim >> halvings for halvings in (1, 2, 3)]
    for number, length in enumerate(lengths):
        short = scorer.shorter(length)
        tests: dict[Role, list[Comparison]] = {"retention": [], "gain": []}
        for suite in (suite for suite in suites if not suite.head):
            whole, cut = (each.score(suite, adapter).hits for each in (scorer, short))
            margin, seed = suite.margin or settings.margin, zlib.crc32(suite.name.encode())
            test = compare_clusters(whole, cut, suite.clusters(), margin=margin, level=settings.alpha, seed=seed)
            tests[suite.role].append(test)
        every = tests["retention"] + ([pool(tests["gain"], settings.margin)] if tests["gain"] else [])
        kept = all(each.units >= settings.min_items and each.p_noninferior <= settings.alpha for each in every)
        if not (kept and tests["retention"]):
            return tuple(lengths[:number])
    return tuple(lengths)


def store_calibration(artifacts: Artifacts, scorer: Scorer, adapter: str | None, found: Calibration) -> None:
    """Store the calibration of an adapter's spaces, in place of an earlier one."""
    spaces = scorer.engine.spaces(adapter)
    artifacts.write_bytes(calibration_key(spaces.image, spaces.text), dump_calibration(found))


def store_missing(
    artifacts: Artifacts, scorer: Scorer, suites: Sequence[Suite], adapter: str | None, settings: Gate
) -> None:
    """Calibrate an adapter whose spaces have no calibration yet."""
    spaces = scorer.engine.spaces(adapter)
    if not artifacts.exists(calibration_key(spaces.image, spaces.text)):
        progress_log.info(f"gate: calibrating {adapter or 'the base'}, which has no calibration yet")
        lengths = kept_lengths(scorer, suites, adapter, settings)
        store_calibration(artifacts, scorer, adapter, Calibration(calibrate(scorer, suites, adapter), lengths))
