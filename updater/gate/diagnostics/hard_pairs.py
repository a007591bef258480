"""Pairs of images that a CLIP cannot tell apart, though their captions say that they differ; and how many of them a
model tells apart: a pair counts only where both of its images are right (MMVP).

Tong et al. (Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs, CVPR 2024, the source of MMVP) take
pairs of images whose cosine is above 0.95 by CLIP and below 0.6 by DINOv2. Here no second vision encoder exists: what
says that two images differ are their captions, by their words and by the text tower. Cosines of a small CLIP have
another range, so both bounds are quantiles over all pairs of the suite.

Pairs are mined by the base, from features that it has: they stay the same whatever is released.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.digests import digest12, digest_json
from updater.gate.diagnostics.diagnose import content_words, interval
from updater.gate.diagnostics.results import PairAccuracy, PairImage, ShownPair
from updater.gate.regressions import MOST_CHARS, thumbnail
from updater.gate.score import Scorer, Vectors, load_arrays, store_arrays
from updater.gate.suite_items import Item, spread
from updater.gate.suites import Suite

MOST_ITEMS: Final = 2_000
"""Items of a suite that are compared, evenly spaced: their cosines take 16 MB."""
MOST_PAIRS: Final = 150
"""As in MMVP."""
NEAR_IMAGES: Final = 0.99
"""Quantile of the cosine of two images from which they look alike."""
FAR_TEXTS: Final = 0.5
"""Quantile of the cosine of two captions up to which they differ."""
MOST_OVERLAP: Final = 1 / 3
"""Share of the words of two captions that they may have in common."""
SAME_IMAGE: Final = 0.9999
"""Cosine from which two images are one image: no model can tell copies apart."""
POOL: Final = 20 * MOST_PAIRS
"""Pairs whose words are looked at, the most similar first."""
FEWEST: Final = 5
"""Pairs from which a share says anything."""
SHOWN: Final = 6


@dataclass(frozen=True, slots=True)
class HardPair:
    """Two items of a suite, by their places, and their cosines by the base."""

    first: int
    second: int
    image_similarity: float
    text_similarity: float


def hard_pairs(scorer: Scorer, suite: Suite) -> tuple[HardPair, ...]:
    """The pairs of a retrieval suite, the most similar first; mined once where the suite's scores are kept, too."""
    path = pair_file(scorer, suite, None, "hard pairs")
    known = load_arrays(path, ("places", "cosines")) if path else None
    if known is not None and known[0].ndim == 2 and (known[0] < len(suite.items())).all():
        rows = zip(known[0].tolist(), known[1].tolist(), strict=True)
        return tuple(HardPair(*places, *cosines) for places, cosines in rows)
    items = suite.items()
    places = spread(range(len(items)), MOST_ITEMS)
    own = [items[place] for place in places]
    images = scorer.images(own, None, f"{suite.name}, base")
    texts = scorer.texts([item.text for item in own], None, f"{suite.name}, base")
    pairs = tuple(
        HardPair(places[pair.first], places[pair.second], pair.image_similarity, pair.text_similarity)
        for pair in mine_pairs(own, images, texts)
    )
    if path:
        store_arrays(
            path,
            places=np.array([[pair.first, pair.second] for pair in pairs], np.int64).reshape(-1, 2),
            cosines=np.array([[pair.image_similarity, pair.text_similarity] for pair in pairs]).reshape(-1, 2),
        )
    return pairs


def pair_file(scorer: Scorer, suite: Suite, adapter: str | None, *what: object) -> Path | None:
    """Where something about a suite's pairs is kept that one model's features tell. None: nowhere."""
    folder = scorer.folder(suite)
    if folder is None:
        return None
    return folder / "pairs" / f"{digest12(digest_json([*what, *scorer.key(suite, adapter)]))}.npz"


def mine_pairs(items: Sequence[Item], images: Vectors, texts: Vectors) -> list[HardPair]:
    """Pairs with a high cosine of their images and a low one of their captions, the highest first.

    An item is in one pair at most, so that pairs are independent. Equal cosines are in the order of the items.

    Args:
        images: L2-normalised [n, dim], and so `texts`, the caption of each item.
    """
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
        pairs.append(HardPair(one, other, float(by_image[each]), float(by_text[each])))
        if len(pairs) == MOST_PAIRS:
            break
    return pairs


def told_apart(images: tuple[Vectors, Vectors], texts: tuple[Vectors, Vectors]) -> NDArray[np.bool_]:
    """Whether both images of each pair are nearer to their own caption than to the other's: bool [pairs].

    Args:
        images: of the first and the second items of the pairs, L2-normalised [pairs, dim]; and so their `texts`.
    """
    (one, other), (own, others) = images, texts

    def cosine(left: Vectors, right: Vectors) -> NDArray[np.float64]:
        product: NDArray[np.float64] = np.einsum("ij,ij->i", left, right, dtype=np.float64)
        return product

    both: NDArray[np.bool_] = (cosine(one, own) > cosine(one, others)) & (cosine(other, others) > cosine(other, own))
    return both


def pair_accuracy(scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str) -> PairAccuracy | None:
    """Of a retrieval suite; None where it has few such pairs."""
    pairs = hard_pairs(scorer, suite)
    if len(pairs) < FEWEST:
        return None
    base, before, after = (right_pairs(scorer, suite, pairs, name) for name in (None, incumbent, candidate))
    wrong = sorted(np.flatnonzero(~after).tolist(), key=lambda place: (not before[place], place))
    first, second = before.astype(np.float64), after.astype(np.float64)
    return PairAccuracy(
        n=len(pairs),
        base=float(base.mean()),
        score=interval(first, second, None, zlib.crc32(f"pairs of {suite.name}".encode())),
        improved=int((after & ~before).sum()),
        worsened=int((before & ~after).sum()),
        shown=tuple(_shown(suite, pairs[place], bool(before[place])) for place in wrong[:SHOWN]),
    )


def right_pairs(scorer: Scorer, suite: Suite, pairs: Sequence[HardPair], adapter: str | None) -> NDArray[np.bool_]:
    """Whether one model tells each pair apart: bool [pairs]; kept beside the suite's scores."""
    path = pair_file(scorer, suite, adapter, "right pairs", [[pair.first, pair.second] for pair in pairs])
    known = load_arrays(path, ("right",)) if path else None
    if known is not None and known[0].shape == (len(pairs),):
        return known[0].astype(bool)
    items = suite.items()
    sides = [[items[pair.first] for pair in pairs], [items[pair.second] for pair in pairs]]
    label = f"{suite.name}, pairs"
    images = tuple(scorer.images(side, adapter, label) for side in sides)
    texts = tuple(scorer.texts([item.text for item in side], adapter, label) for side in sides)
    right = told_apart((images[0], images[1]), (texts[0], texts[1]))
    if path:
        store_arrays(path, right=right)
    return right


def _shown(suite: Suite, pair: HardPair, right_before: bool) -> ShownPair:
    first, second = (_image(suite.items()[place]) for place in (pair.first, pair.second))
    return ShownPair(first, second, pair.image_similarity, right_before)


def _image(item: Item) -> PairImage:
    if item.sample_id:
        return PairImage("", "", item.sample_id)
    return PairImage(item.text[:MOST_CHARS], thumbnail(item))
