"""All diagnostics of one gate run, from answers and features that it already has; and a suite's result by how often its
concepts were seen in training.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.digests import digest12, digest_json
from core.errors import RatchetError
from streams.store.sample_store import Having, SampleStore
from updater.gate.answers import polarity
from updater.gate.decision import Scores
from updater.gate.diagnostics.results import TAIL_BINS, YES_BOUND, Diagnostics, Interval, Tail, TailBin
from updater.gate.evaluator import Evaluator, M
from updater.gate.resampling import Floats, bootstrap
from updater.gate.score import load_arrays, store_arrays
from updater.gate.suite_items import Item
from updater.gate.suites import Suite

EDGES: Final = (1, 10, 100)
"""Counts at which the second bin and those after it begin."""
LEVEL: Final = 0.05
"""Beyond each end of an interval."""
DRAWS: Final = 2_000
"""Of the bootstrap: 100 lie beyond each end."""
MAX_ROWS = 1_000_000
"""Samples whose words are looked at, some 10 s; of more, every n-th, and counts are multiplied by n."""
COLUMNS = ("text", "question", "answer", "concept", "label")
_WORD = re.compile(r"[^\W_]+")
_STOP = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
Words = frozenset[str]


def diagnose(
    evaluator: Evaluator[M],
    scores: Sequence[Scores],
    incumbent: str | None,
    candidate: str,
    counts: ConceptCounts | None,
) -> Diagnostics:
    """What is told beside a decision. It decides nothing, so what cannot be computed becomes a warning.

    Args:
        scores: all suites; none where the candidate could not be scored.
        counts: of concepts in the training data; None: there are none, and results are not split by them.
    """
    if not scores:
        return Diagnostics()
    warnings = []
    diagnostics = Diagnostics()
    try:
        diagnostics = evaluator.diagnostics(scores, incumbent, candidate)
    except (RatchetError, RuntimeError, ValueError) as error:
        warnings.append(f"features and answers could not be compared: {error}")
    try:
        diagnostics = replace(diagnostics, tail=measure_tail(scores, counts) if counts else None)
    except RatchetError as error:
        warnings.append(f"results are not split by how often concepts were seen: {error.message}")
    return replace(diagnostics, warnings=(*_moved_away(diagnostics), *warnings))


def _moved_away(diagnostics: Diagnostics) -> list[str]:
    """Suites whose share of "yes" left the truth."""
    return [
        f'{name}: "yes" is {share.after:.0%} of the answers, before {share.before:.0%}; it is right for '
        f"{share.truth:.0%} (a warning from {YES_BOUND:.0%} further away)"
        for name, share in diagnostics.yes.items()
        if share.moved_away > YES_BOUND
    ]


def measure_tail(scores: Sequence[Scores], counts: ConceptCounts) -> Tail | None:
    """Split the results of suites by how often their concepts were seen in training, after Let It Wag (Udandarao et
    al., No "Zero-Shot" Without Exponential Data, NeurIPS 2024): what is rare in the data is what a mean hides. None
    where the store has no training sample. Raises StoreError.
    """
    concepts = [[concept_of(s.suite, item) for item in s.suite.items()] for s in scores]
    seen = counts(concept for each in concepts for concept in each)
    if not seen.rows:
        return None
    suites = {}
    for s, own in zip(scores, concepts, strict=True):
        places = np.searchsorted(EDGES, [seen[concept] for concept in own], side="right")
        suites[s.suite.name] = tuple(_bins(s, places))
    return Tail(seen.rows, seen.counted, suites)


def concept_of(suite: Suite, item: Item) -> str:
    """What an item shows, in words: its class; its concept, or its caption where the data name none; of a question
    without a concept its answer, or the question where that is yes or no."""
    if suite.task == "classification":
        return suite.names.get(item.text, item.text)
    if item.concept or suite.task == "retrieval":
        return item.concept or item.text
    answer = item.answers[0] if item.answers else ""
    return item.text if not answer or polarity(answer) else answer


def interval(before: Floats, after: Floats, clusters: NDArray[np.int_] | None, seed: int) -> Interval:
    """Both means over items and their difference, resampled by cluster; `before` and `after` are [n] or [n, views]."""
    first, second = (each.reshape(len(each), -1).mean(axis=1) for each in (before, after))
    index = np.arange(len(first)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(index, weights=second - first).astype(np.float64)
    boot = bootstrap(sums, np.bincount(index).astype(np.float64), seed=seed, draws=DRAWS)
    return Interval(float(first.mean()), float(second.mean()), boot.difference, boot.low(LEVEL), boot.high(LEVEL))


def _bins(scores: Scores, places: NDArray[np.int_]) -> Iterable[TailBin]:
    for place, name in enumerate(TAIL_BINS):
        where = places == place
        if where.any():
            clusters = None if scores.clusters is None else scores.clusters[where]
            seed = zlib.crc32(f"{scores.suite.name} {name}".encode())
            score = interval(scores.before.hits[where], scores.after.hits[where], clusters, seed)
            n = int(where.sum())
            yield TailBin(name, n, n if clusters is None else len(np.unique(clusters)), score)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many samples name each concept."""

    of: Mapping[Words, int]
    rows: int
    """All samples."""
    counted: int
    """Those that were looked at."""

    def __getitem__(self, concept: str) -> int:
        return self.of.get(content_words(concept), 0)


ConceptCounts = Callable[[Iterable[str]], Counts]
"""Counts concepts in what a candidate may have learned from; raises StoreError."""


def content_words(text: str) -> Words:
    """The words of a text that say what is shown; all of them where there is no such word.

    >>> sorted(content_words("The flag of Côte_d'Ivoire"))
    ['côte', 'd', 'flag', 'ivoire']
    """
    words = frozenset(_WORD.findall(text.casefold()))
    return words - _STOP or words


class StoreCounts:
    """Counts how often the training split of one version of the sample store names a concept. What was counted is kept
    in a folder.

    A sample names a concept when its caption, question and answer, concept and label hold all of the concept's words,
    in any order; articles and prepositions do not count. So Udandarao et al. (No "Zero-Shot" Without Exponential Data,
    NeurIPS 2024, the source of Let It Wag) search captions, by lemmas where we take words as they are.
    """

    def __init__(self, store: SampleStore, version: int, having: Having | None, cache: Path | None = None) -> None:
        """``version``: one that is pinned, or that is kept meanwhile; ``having``: what a sample must have for the
        family to learn from it."""
        self.store, self.version, self.having, self.cache = store, version, having, cache

    def __call__(self, concepts: Iterable[str]) -> Counts:
        """Raises StoreError."""
        terms = sorted({content_words(concept) for concept in concepts}, key=sorted)
        rows = self.store.count(self.version, "train", having=self.having)
        stride = max(1, -(-rows // MAX_ROWS))
        path = self._path(terms, rows)
        known = load_arrays(path, ("counts", "counted")) if path else None
        if known is None or known[0].shape != (len(terms),):
            counts, counted = count_terms(self._samples(stride), terms)
            known = [counts * stride, np.array(counted)]
            if path:
                store_arrays(path, counts=known[0], counted=known[1])
        of = {term: int(count) for term, count in zip(terms, known[0], strict=True)}
        return Counts(of, rows, int(known[1]))

    def _samples(self, stride: int) -> Iterator[Words]:
        """The words of every stride-th sample."""
        start = 0
        for batch in self.store.addresses(COLUMNS, self.version, "train", self.having):
            columns = [batch[name].to_pylist()[start % stride :: stride] for name in COLUMNS]
            start = (start - batch.num_rows) % stride
            for values in zip(*columns, strict=True):
                yield frozenset(_WORD.findall(" ".join(filter(None, values)).casefold()))

    def _path(self, terms: Sequence[Words], rows: int) -> Path | None:
        if self.cache is None:
            return None
        what = [self.store.url, self.version, rows, self.having, [sorted(term) for term in terms]]
        return self.cache / "concepts" / f"{digest12(digest_json(what))}.npz"


def count_terms(samples: Iterable[Words], terms: Sequence[Words]) -> tuple[np.ndarray, int]:
    """For each term the number of samples that have all of its words, int64 [terms]; and the number of samples.

    A term is looked for only where its rarest word, among the terms, is: the work depends on what a sample holds.
    """
    shared = Counter(word for term in terms for word in term)
    by_word: dict[str, list[tuple[int, Words]]] = defaultdict(list)
    for place, term in enumerate(terms):
        if term:
            by_word[min(term, key=lambda word: (shared[word], word))].append((place, term))
    counts = np.zeros(len(terms), np.int64)
    total = 0
    for words in samples:
        total += 1
        for word in words & by_word.keys():
            for place, term in by_word[word]:
                counts[place] += term <= words
    return counts, total
