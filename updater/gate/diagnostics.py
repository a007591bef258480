"""Diagnostics of one gate run, from its answers and features. They explain results and decide nothing."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.digests import digest12, digest_json
from streams.store.sample_store import Having, SampleStore
from updater.gate.checks import FEWEST, effective_rank, share_of
from updater.gate.decision import Scores
from updater.gate.score import MOST_CHARS, Scorer, Vectors, kept, prompt, thumbnail
from updater.gate.statistics import Floats, bootstrap
from updater.gate.suite_items import Item, polarity, spread
from updater.gate.suites import Suite
from updater.gate.verdict import (
    TAIL_BINS,
    FeatureShift,
    Interval,
    PairAccuracy,
    PairImage,
    ShownPair,
    Tail,
    TailBin,
    TowerShift,
    YesShare,
)

LEVEL: Final = 0.05
DRAWS: Final = 2_000
"""Bootstrap draws: 100 are beyond each end."""
EDGES: Final = (1, 10, 100)
MAX_ROWS = 1_000_000
"""Samples whose words are read, some 10 s; of more, every n-th, with counts multiplied by n."""
COLUMNS = ("text", "question", "answer", "concept", "label")
_WORD = re.compile(r"[^\W_]+")
_STOP = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "or", "the", "to", "with"])
Words = frozenset[str]

MOST_ITEMS: Final = 2_000
"""Items of a suite to compare, evenly spaced: their cosines take 16 MB."""
MOST_PAIRS: Final = 150
NEAR_IMAGES: Final = 0.99
"""Quantile of the cosine of two images from which they look alike."""
FAR_TEXTS: Final = 0.5
"""Quantile of the cosine of two captions up to which they differ."""
MOST_OVERLAP: Final = 1 / 3
SAME_IMAGE: Final = 0.9999
"""Cosine from which two images are the same: no model can tell copies apart."""
POOL: Final = 20 * MOST_PAIRS
FEWEST_PAIRS: Final = 5
SHOWN: Final = 6
SHIFT_ITEMS: Final = 128
"""Over all retention suites. A model whose answers came from the cache computes as many images and texts, a second."""


def interval(before: Floats, after: Floats, clusters: NDArray[np.int_] | None, seed: int) -> Interval:
    """Both means over items and their difference, resampled by cluster; `before` and `after` are [n] or [n, views]."""
    first, second = (each.reshape(len(each), -1).mean(axis=1) for each in (before, after))
    index = np.arange(len(first)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(index, weights=second - first).astype(np.float64)
    boot = bootstrap(sums, np.bincount(index).astype(np.float64), seed=seed, draws=DRAWS)
    return Interval(float(first.mean()), float(second.mean()), boot.difference, boot.low(LEVEL), boot.high(LEVEL))


# Results by how often a concept was seen


@dataclass(frozen=True, slots=True)
class Counts:
    of: Mapping[Words, int]
    rows: int
    counted: int

    def __getitem__(self, concept: str) -> int:
        return self.of.get(content_words(concept), 0)


ConceptCounts = Callable[[Iterable[str]], Counts]
"""Counts concepts in the data that a candidate may have learned from; raises StoreError."""


def measure_tail(scores: Sequence[Scores], counts: ConceptCounts) -> Tail | None:
    """Split the results of suites by how often their concepts were seen in training, after Let It Wag (Udandarao et
    al., NeurIPS 2024). None without training samples. Raises StoreError."""
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
    """Concept that an item shows, in words: its class; its concept, or its caption if there is none; for a question
    without a concept its answer, or the question itself if that is yes or no."""
    if suite.task == "classification":
        return suite.names.get(item.text, item.text)
    if item.concept or suite.task == "retrieval":
        return item.concept or item.text
    answer = item.answers[0] if item.answers else ""
    return item.text if not answer or polarity(answer) else answer


def _bins(scores: Scores, places: NDArray[np.int_]) -> Iterable[TailBin]:
    for place, name in enumerate(TAIL_BINS):
        where = places == place
        if where.any():
            clusters = None if scores.clusters is None else scores.clusters[where]
            seed = zlib.crc32(f"{scores.suite.name} {name}".encode())
            score = interval(scores.before.hits[where], scores.after.hits[where], clusters, seed)
            n = int(where.sum())
            yield TailBin(name, n, n if clusters is None else len(np.unique(clusters)), score)


def content_words(text: str) -> Words:
    """Words of a text other than articles and prepositions; all words if nothing else is left."""
    words = frozenset(_WORD.findall(text.casefold()))
    return words - _STOP or words


class StoreCounts:
    """Counts how often the training split of one version of the sample store names a concept; counts are cached in a
    folder. A sample names a concept if its caption, question and answer, concept and label together contain all of the
    concept's words, in any order; articles and prepositions do not count."""

    def __init__(self, store: SampleStore, version: int, having: Having | None, cache: Path | None = None) -> None:
        """``version``: pinned, or otherwise kept meanwhile; ``having``: field that a sample needs for the family."""
        self.store, self.version, self.having, self.cache = store, version, having, cache

    def __call__(self, concepts: Iterable[str]) -> Counts:
        terms = sorted({content_words(concept) for concept in concepts}, key=sorted)
        rows = self.store.count(self.version, "train", having=self.having)
        stride = max(1, -(-rows // MAX_ROWS))

        def compute() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            counts, counted = count_terms(self._samples(stride), terms)
            return counts * stride, np.array(counted)

        what = [self.store.url, self.version, rows, self.having, [sorted(term) for term in terms]]
        path = self.cache and self.cache / "concepts" / f"{digest12(digest_json(what))}.npz"
        counts, counted = kept(path, ("counts", "counted"), compute, lambda known: known[0].shape == (len(terms),))
        return Counts({term: int(count) for term, count in zip(terms, counts, strict=True)}, rows, int(counted))

    def _samples(self, stride: int) -> Iterator[Words]:
        start = 0
        for batch in self.store.addresses(COLUMNS, self.version, "train", self.having):
            columns = [batch[name].to_pylist()[start % stride :: stride] for name in COLUMNS]
            start = (start - batch.num_rows) % stride
            for values in zip(*columns, strict=True):
                yield frozenset(_WORD.findall(" ".join(filter(None, values)).casefold()))


def count_terms(samples: Iterable[Words], terms: Sequence[Words]) -> tuple[NDArray[np.int64], int]:
    """Number of samples that contain all words of each term, int64 [terms]; and the number of samples. A term is only
    looked up by its rarest word among the terms, so the work depends on the words of a sample."""
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


# Pairs of images that look alike


@dataclass(frozen=True, slots=True)
class HardPair:
    first: Item
    second: Item
    image_similarity: float
    text_similarity: float


def pair_accuracy(scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str) -> PairAccuracy | None:
    pairs = hard_pairs(scorer, suite)
    if len(pairs) < FEWEST_PAIRS:
        return None
    base, before, after = (right_pairs(scorer, suite, pairs, name) for name in (None, incumbent, candidate))
    wrong = sorted(np.flatnonzero(~after).tolist(), key=lambda place: (not before[place], place))
    shown = (
        ShownPair(_shown(p.first), _shown(p.second), p.image_similarity, bool(before[place]))
        for place in wrong[:SHOWN]
        for p in (pairs[place],)
    )
    first, second = before.astype(np.float64), after.astype(np.float64)
    return PairAccuracy(
        n=len(pairs),
        base=float(base.mean()),
        score=interval(first, second, None, zlib.crc32(f"pairs of {suite.name}".encode())),
        improved=int((after & ~before).sum()),
        worsened=int((before & ~after).sum()),
        shown=tuple(shown),
    )


def hard_pairs(scorer: Scorer, suite: Suite) -> list[HardPair]:
    """Pairs of a retrieval suite that a CLIP cannot tell apart though their captions differ, the most similar first. As
    in MMVP (Tong et al., Eyes Wide Shut?, CVPR 2024), with captions instead of a second vision encoder and quantiles
    instead of bounds. They are mined once by the base, so releases do not change them."""
    items = spread(suite.items(), MOST_ITEMS)
    places = {item.id: place for place, item in enumerate(items)}

    def compute() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        images = scorer.images(items, None, f"{suite.name}, base")
        texts = scorer.texts([item.text for item in items], None, f"{suite.name}, base")
        pairs = mine_pairs(items, images, texts)
        return (
            np.array([[places[p.first.id], places[p.second.id]] for p in pairs], np.int64).reshape(-1, 2),
            np.array([[p.image_similarity, p.text_similarity] for p in pairs]).reshape(-1, 2),
        )

    path = _pair_file(scorer, suite, None, "hard pairs of items")
    found, cosines = kept(
        path, ("places", "cosines"), compute, lambda known: known[0].ndim == 2 and bool((known[0] < len(items)).all())
    )
    return [
        HardPair(items[first], items[second], *similar)
        for (first, second), similar in zip(found.tolist(), cosines.tolist(), strict=True)
    ]


def mine_pairs(items: Sequence[Item], images: Vectors, texts: Vectors) -> list[HardPair]:
    """Pairs with a high cosine of their images and a low one of their captions, the highest first. An item is in at
    most one pair, so that pairs are independent. Ties are in the order of items. ``images``: L2-normalised [n, dim], as
    are `texts`, the caption of each item."""
    first, second = (each.astype(np.int32) for each in np.triu_indices(len(items), 1))
    by_image, by_text = ((vectors @ vectors.T)[first, second] for vectors in (images, texts))
    if not len(first) or not (np.isfinite(by_image).all() and np.isfinite(by_text).all()):
        return []
    near = (by_image >= np.quantile(by_image, NEAR_IMAGES)) & (by_image < SAME_IMAGE)
    chosen = np.flatnonzero(near & (by_text <= np.quantile(by_text, FAR_TEXTS)))
    chosen = chosen[np.argsort(-by_image[chosen], kind="stable")][:POOL]
    words = [content_words(item.text) for item in items]
    used: set[int] = set()
    pairs: list[HardPair] = []
    for each in chosen:
        one, other = int(first[each]), int(second[each])
        if {one, other} & used or items[one].source == items[other].source:
            continue
        if len(words[one] & words[other]) > MOST_OVERLAP * len(words[one] | words[other]):
            continue
        used |= {one, other}
        pairs.append(HardPair(items[one], items[other], float(by_image[each]), float(by_text[each])))
        if len(pairs) == MOST_PAIRS:
            break
    return pairs


def right_pairs(scorer: Scorer, suite: Suite, pairs: Sequence[HardPair], adapter: str | None) -> NDArray[np.bool_]:
    label = f"{suite.name}, pairs"

    def compute() -> tuple[NDArray[np.bool_]]:
        sides = [pair.first for pair in pairs], [pair.second for pair in pairs]
        one, other = (scorer.images(side, adapter, label) for side in sides)
        own, others = (scorer.texts([item.text for item in side], adapter, label) for side in sides)
        return (told_apart((one, other), (own, others)),)

    path = _pair_file(scorer, suite, adapter, "right pairs", [[pair.first.id, pair.second.id] for pair in pairs])
    (right,) = kept(path, ("right",), compute, lambda known: known[0].shape == (len(pairs),))
    return right.astype(bool)


def told_apart(images: tuple[Vectors, Vectors], texts: tuple[Vectors, Vectors]) -> NDArray[np.bool_]:
    """Mask of the pairs in which both images are nearer to their own caption than to the other's, bool [pairs].
    ``images``: of the first and second items of the pairs, L2-normalised [pairs, dim], as are `texts`."""
    (one, other), (own, others) = images, texts

    def cosine(left: Vectors, right: Vectors) -> NDArray[np.float64]:
        cosines: NDArray[np.float64] = np.einsum("ij,ij->i", left, right, dtype=np.float64)
        return cosines

    return (cosine(one, own) > cosine(one, others)) & (cosine(other, others) > cosine(other, own))


def _pair_file(scorer: Scorer, suite: Suite, adapter: str | None, *what: object) -> Path | None:
    folder = scorer.cache or suite.cache
    return folder and folder / "pairs" / f"{digest12(digest_json([*what, *scorer.key(suite, adapter)]))}.npz"


def _shown(item: Item) -> PairImage:
    if item.sample_id:
        return PairImage("", "", item.sample_id)
    return PairImage(item.text[:MOST_CHARS], thumbnail(item))


# What moved in features and answers


def feature_shift(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str
) -> FeatureShift | None:
    """Measure how far an update moved the features of each tower, and their spread, on a few items of every retention
    suite with their texts (RESTORE: Yang et al., 2024). None with fewer than two. Raises ValueError for features that
    are not finite."""
    retention = [suite for suite in suites if suite.role == "retention"]
    chosen = [
        (item, item.text if suite.task == "retrieval" else prompt(suite.templates[0], suite, item.text))
        for suite in retention
        for item in spread(suite.items(), max(2, SHIFT_ITEMS // len(retention)))
    ]
    items = list({item.source: item for item, _ in chosen}.values())
    texts = sorted({text for _, text in chosen})
    if min(len(items), len(texts)) < 2:
        return None
    images = [scorer.images(items, name, "feature shift") for name in (None, incumbent, candidate)]
    words = [scorer.texts(texts, name, "feature shift") for name in (None, incumbent, candidate)]
    if not all(np.isfinite(features).all() for features in (*images, *words)):
        raise ValueError("features are not finite")
    towers = {
        tower: TowerShift(
            len(after),
            mean_shift(before, after),
            mean_shift(base, after),
            effective_rank(before),
            effective_rank(after),
        )
        for tower, (base, before, after) in (("image", images), ("text", words))
    }
    return FeatureShift(towers, modality_gap(images[1], words[1]), modality_gap(images[2], words[2]))


def mean_shift(before: Vectors, after: Vectors) -> float:
    """Mean of 1 - cosine between the rows of two L2-normalised arrays [n, dim]."""
    return float(1.0 - np.einsum("ij,ij->i", before, after, dtype=np.float64).mean())


def modality_gap(images: Vectors, texts: Vectors) -> float:
    """Distance between the means of two sets of L2-normalised features, 0 to 2 (Liang et al., Mind the Gap, NeurIPS
    2022)."""
    return float(np.linalg.norm(images.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)))


def yes_share(suite: Suite, base: Sequence[str], before: Sequence[str], after: Sequence[str]) -> YesShare | None:
    """Share of yes among a VLM's answers to the suite's yes/no questions (POPE: Li et al., EMNLP 2023); None if there
    are few. Answers are aligned with its items; an answer that is neither yes nor no is not yes."""
    references = [item.answers[0] if item.answers else "" for item in suite.items()]
    closed = [bool(polarity(reference)) for reference in references]
    if sum(closed) < FEWEST:
        return None
    shares = [share_of("yes", list(compress(texts, closed))) for texts in (references, base, before, after)]
    return YesShare(sum(closed), *shares)
