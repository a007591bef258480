"""Items of suites: their sources, their selection, and grades of free-text answers. Answers and references are
normalised as in the evaluation of VQA v2 (Antol et al., ICCV 2015; Goyal et al., CVPR 2017; rules at
https://visualqa.org/evaluation.html): lower case, number words as digits, no articles, no punctuation except decimal
points and apostrophes, contractions with their apostrophe."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from core.digests import digest12, digest_json
from core.errors import GateError, RecordError
from core.settings import Settings
from ratchet_client.images import OpenedImage, open_accepted
from streams.publish.folders import FolderItem
from streams.store.sample_store import SampleStore

Half = Literal["all", "tuning", "hidden"]
Part = Literal["judged", "sealed"]
Result = TypeVar("Result")
T = TypeVar("T")
SAMPLE = "sample/"
"""Prefix of an item's source for a sample of the store; a folder's is an absolute path."""
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't how'd how's isn't it'd it'll "
    "let's might've mightn't must've mustn't needn't shan't she's should've shouldn't somebody's someone's that's "
    "there'd there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've "
    "when's where'd where's who'd who'll who's who've why's won't would've wouldn't y'all you'd you'll you're you've"
)
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
"""Only those that are no other word without the apostrophe: `its`, `well` and `hell` stay."""
_GROUPING = re.compile(r"(?<=\d),(?=\d)")
_POINT = re.compile(r"\.(?!\d)")
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!:*#]")
SEALED = 4
"""One item in so many is sealed."""
AGREEING = 3
"""Human answers that must agree before an answer counts in full (VQA v2)."""


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    text: str
    """The caption; the class label in a classification suite; the question in a VQA suite."""
    key: str
    """Determines the half: items of one concept are all tuned on, or all hidden."""
    name: str
    """The image's path inside its folder, independent of the home folder."""
    source: str
    """Identifies the image: suites that ask different things about it embed it once."""
    read: Callable[[], bytes]
    answers: tuple[str, ...] = ()
    concept: str = ""
    origin: str = ""
    """Column `source` of a sample: who sent it. Empty for an item of a folder."""
    asked: str = ""
    """Question to a VLM, where it is not the text."""

    @property
    def sample_id(self) -> str:
        """ID in the sample store; empty for an item of a folder."""
        return self.source.removeprefix(SAMPLE) if self.source.startswith(SAMPLE) else ""


def make_item(name: str, source: str, text: str, key: str, read: Callable[[], bytes], **more: Any) -> Item:
    return Item(digest12(digest_json([name, text])), text, key, name, source, read, **more)


def captioned(row: FolderItem, place: str, text: str) -> Item:
    # If the class is the only concept, each picture goes to a half by itself.
    key = row.path.name if row.concept == text else row.concept or row.text or row.path.name
    return make_item(place, str(row.path.absolute()), text, key, row.bytes, concept=row.concept)


def question_item(row: FolderItem, place: str) -> Item:
    answers = tuple(sorted(row.answers or (row.answer,), key=lambda answer: answer != row.answer))
    key, source = row.concept or row.path.name, str(row.path.absolute())
    return make_item(place, source, row.question, key, row.bytes, answers=answers, concept=row.concept)


def sample_item(
    row: Mapping[str, Any], images: Callable[[str], bytes], text: str, answer: str = "", key: str = ""
) -> Item:
    """Item of a sample of the store. ``images``: by sample ID; ``key``: its concept by default."""
    source, concept = f"{SAMPLE}{row['id']}", row.get("concept") or ""
    key = key or concept or (source if answer else text)
    more = {"answers": (answer,) if answer else (), "concept": concept, "origin": row.get("source") or ""}
    return make_item(source, source, text, key, partial(images, row["id"]), **more)


def caption_clusters(items: Sequence[Item]) -> NDArray[np.int_]:
    """Cluster number of each item; items connected by shared captions or images, directly or indirectly, form a
    cluster. A caption has one vector, so an update changes it for all items with that caption, ignoring case."""
    texts = np.unique([item.text.casefold() for item in items], return_inverse=True)[1]
    images = np.unique([item.source for item in items], return_inverse=True)[1] + len(items)
    graph = coo_array((np.ones(len(items)), (texts, images)), shape=(2 * len(items), 2 * len(items)))
    clusters: NDArray[np.int_] = connected_components(graph, directed=False)[1][texts]
    return clusters


def image_clusters(items: Sequence[Item]) -> NDArray[np.int_]:
    return np.unique([digest12(item.read()) for item in items], return_inverse=True)[1]


def without_lonely(items: Iterable[Item]) -> list[Item]:
    """Items whose class has more than one member: a single member measures the member, not the class."""
    listed = list(items)
    sizes = Counter(item.text for item in listed)
    return [item for item in listed if sizes[item.text] > 1]


def limited(items: Sequence[Item], limit: int, seed: int) -> list[Item]:
    """Draw by a hash of seed and image: independent of the order of rows, and equal for two suites over one folder."""
    return sorted(in_order_of_draw(items, seed)[:limit], key=lambda item: item.id)


def in_order_of_draw(items: Iterable[Item], seed: int) -> list[Item]:
    unique = {item.id: item for item in items}.values()
    return sorted(unique, key=lambda item: (digest_json([seed, item.name]), item.id))


def of_half(items: Iterable[Item], half: Half) -> list[Item]:
    if half == "all":
        return list(items)
    bit = 1 if half == "hidden" else 0
    return [item for item in items if int(digest_json(item.key)[:8], 16) % 2 == bit]


@dataclass(frozen=True)
class Seal:
    """Seals a quarter of all items by a keyed hash: no candidate is judged on them, only audits ask for them. Sealed
    samples before ``audited``, the end of the data of the last audit, have joined the rest."""

    key: bytes
    audited: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, settings: Settings, store: SampleStore, audited: Mapping[str, int]) -> Seal:
        """With the secret of the split into training and held-out samples."""
        return cls(settings.ingest.own_split_key or store.table.identity()[1], tuple(sorted(audited.items())))

    def holds(self, name: str) -> bool:
        return blake2b(name.encode(), key=self.key, person=b"seal", digest_size=1).digest()[0] % SEALED == 0


def of_part(items: Iterable[Item], part: Part, seal: Seal) -> list[Item]:
    return [item for item in items if seal.holds(item.key) == (part == "sealed")]


def spread(items: Sequence[T], count: int) -> list[T]:
    return list(items[:: max(1, len(items) // max(count, 1))][:count])


def open_picture(item: Item) -> Image.Image:
    """The decoded RGB image. Raises GateError naming the item."""
    return read_picture(item, OpenedImage.decode)


def read_picture(item: Item, read: Callable[[OpenedImage], Result]) -> Result:
    """Apply ``read`` to the item's image. Raises GateError naming the item."""
    try:
        return read(open_accepted(item.read()))
    except (OSError, RecordError) as error:
        raise GateError(
            f"the image of suite item {item.name[:300]} cannot be read: {error}",
            "Replace or remove that row of data.csv, or delete that sample.",
        ) from error


def normalise(answer: str) -> str:
    """Normalise for comparison: "The two red-brown dogs, dont you see?" becomes "2 red brown dogs don't you see"."""
    text = _GROUPING.sub("", answer.lower().replace("’", "'"))
    words = _MARKS.sub(" ", _POINT.sub("", text)).split()
    return " ".join(_CONTRACTIONS.get(w, w) for w in (_NUMBERS.get(w, w) for w in words) if w not in _ARTICLES)


def grade(metric: str, answer: str, references: Sequence[str]) -> float:
    """Score of an answer, in [0, 1]. exact_match: 1 if it equals a reference. vqa_accuracy: with three references or
    more, a third for each that it equals, at most 1; else as exact_match. yes_no: 1 if its first word is the "yes" or
    "no" of the first reference."""
    if metric == "yes_no":
        answered = polarity(answer)
        return float(bool(answered) and answered == polarity(references[0]))
    own = normalise(answer)
    matches = sum(own == normalise(reference) for reference in references) if own else 0
    if metric == "vqa_accuracy" and len(references) >= AGREEING:
        return min(matches / AGREEING, 1.0)
    return float(matches > 0)


def polarity(answer: str) -> str:
    first, *_ = normalise(answer).split() or [""]
    return first if first in ("yes", "no") else ""


def majority(metric: str, references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The answer that scores best when given to every question, and its mean score: the baseline without an image."""
    best, most = "", 0.0
    for answer in sorted({normalise(reference) for own in references for reference in own}):
        earned = sum(grade(metric, answer, own) for own in references) / len(references)
        if earned > most:
            best, most = answer, earned
    return best, most
