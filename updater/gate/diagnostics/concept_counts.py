"""How often the training split of the sample store names a concept.

A sample names a concept when its caption, question and answer, concept and label hold all of the concept's words, in
any order; articles and prepositions do not count. So Udandarao et al. (No "Zero-Shot" Without Exponential Data,
NeurIPS 2024, the source of Let It Wag) search captions, by lemmas where we take words as they are.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from core.digests import digest12, digest_json
from streams.store import Having, SampleStore
from updater.gate.score import load_arrays, store_arrays

MAX_ROWS = 1_000_000
"""Samples whose words are looked at, some 10 s; of more, every n-th, and counts are multiplied by n."""
COLUMNS = ("text", "question", "answer", "concept", "label")
_WORD = re.compile(r"[^\W_]+")
_STOP = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
Words = frozenset[str]


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


class ConceptCounts(Protocol):
    """Counts concepts in what a candidate may have learned from."""

    def __call__(self, concepts: Iterable[str]) -> Counts:
        """Raises StoreError."""


def content_words(text: str) -> Words:
    """The words of a text that say what is shown; all of them where there is no such word.

    >>> sorted(content_words("The flag of Côte_d'Ivoire"))
    ['côte', 'd', 'flag', 'ivoire']
    """
    words = frozenset(_WORD.findall(text.casefold()))
    return words - _STOP or words


class StoreCounts:
    """Counts in one version of the sample store. What was counted is kept in a folder."""

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
