"""Training pairs of the candidates: of the prepared domains' training splits, and with false captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from benchmarks.gate.plans import KNOWN, GatePlan
from core.digests import digest_json
from streams.publish.folders import FolderItem, read_folder
from updater.bases import REFERENCE
from updater.data.pools import Pair, Pools

REFERENCE_PAIRS = 160
NOTHING = "a picture"


def pools(plan: GatePlan, home: Path) -> Pools:
    """The pools of one candidate; the same for the same plan."""
    rng = np.random.default_rng(plan.seed)
    lies = round(plan.new * plan.share)
    new = pairs(home, plan.domain, plan.new - lies, rng)
    if plan.lie == "shuffled":
        new = captioned(new, [new[i].text for i in rng.permutation(len(new))])
    elif plan.lie == "mislabelled":
        false = exchanged(home / "data" / plan.domain)
        new = captioned(new, [false[pair.id.partition("/")[2]] for pair in new])
    elif lies:
        about = [plan.victim] if plan.victim else list(KNOWN)
        known = [pair for domain in about for pair in pairs(home, domain, lies // len(about), rng)]
        new += captioned(known, [NOTHING] * len(known) if plan.lie == "forgotten" else _others(known))
    if plan.recipe.mixture.reference == 0:
        return Pools(tuple(new)).shuffled(plan.seed)
    held = [domain for domain in REFERENCE if domain != plan.victim]
    reference = [pair for domain in held for pair in pairs(home, domain, REFERENCE_PAIRS // len(held), rng)]
    return Pools(tuple(new), tuple(reference)).shuffled(plan.seed)


def pairs(home: Path, domain: str, count: int, rng: np.random.Generator) -> list[Pair]:
    """``count`` pairs of the part of a domain's training split that is not reserved (all, if there are fewer)."""
    rows = _rows(home / "data" / domain)
    chosen = rng.permutation(len(rows))[:count]
    return [Pair(f"{domain}/{rows[i].path.name}", rows[i].text, rows[i].bytes) for i in chosen]


def captioned(given: Sequence[Pair], texts: Sequence[str]) -> list[Pair]:
    return [replace(pair, text=text) for pair, text in zip(given, texts, strict=True)]


def _others(given: Sequence[Pair]) -> list[str]:
    """Each picture gets the caption of another, and equal captions become equal ones: a learnable falsehood."""
    texts = sorted({pair.text for pair in given})
    next_one = dict(zip(texts, texts[1:] + texts[:1], strict=True))
    return [next_one[pair.text] for pair in given]


@lru_cache(maxsize=8)
def exchanged(folder: Path) -> Mapping[str, str]:
    """A false caption for each picture of a domain, training split and held-out items alike, by the file's name.

    A class of pictures (by the commonest of their tags) gets the captions of another class: each picture that of the
    one a third of the domain further on. So the falsehood can be learned, and shows in pictures and captions that were
    never seen; :func:`_others` would not, because no caption of these domains is used for many pictures.
    """
    rows = [row for row in read_folder(folder) if row.text]
    uses = Counter(tag for row in rows for tag in row.tags)

    def place(row: FolderItem) -> tuple[int, str, str]:
        tag = max(row.tags, key=lambda tag: (uses[tag], tag), default="")
        return -uses[tag], tag, row.path.name

    order = sorted(rows, key=place)
    further = [*order[len(order) // 3 :], *order[: len(order) // 3]]
    return {row.path.name: other.text for row, other in zip(order, further, strict=True)}


def reserved(row: FolderItem) -> bool:
    """True if a row of a training split is excluded from training: half of the concepts, by their hash."""
    return int(digest_json(["reserved", row.concept or row.text or row.path.name])[:8], 16) % 2 == 1


@lru_cache(maxsize=8)
def _rows(folder: Path) -> list[FolderItem]:
    return [row for row in read_folder(folder, split="train") if row.text and not reserved(row)]
