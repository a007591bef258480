"""Grading free-text answers: normalisation and metrics of visual question answering.

Normalisation follows the evaluation of VQA v2 (Antol et al., ICCV 2015; Goyal et al., CVPR 2017; rules at
https://visualqa.org/evaluation.html): lower case, number words as digits, no articles, no punctuation but the
points of decimal numbers and apostrophes, contractions with their apostrophe. Answer and references go through it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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
AGREEING = 3
"""Answers of people that must agree before an answer counts in full (VQA v2)."""


def normalise(answer: str) -> str:
    """One answer in its comparable form.

    >>> normalise("The two red-brown dogs, dont you see?")
    "2 red brown dogs don't you see"
    """
    text = _GROUPING.sub("", answer.lower().replace("’", "'"))
    words = _MARKS.sub(" ", _POINT.sub("", text)).split()
    return " ".join(_CONTRACTIONS.get(w, w) for w in (_NUMBERS.get(w, w) for w in words) if w not in _ARTICLES)


def grade(metric: str, answer: str, references: Sequence[str]) -> float:
    """What an answer earns, in [0, 1].

    exact_match   1 if it equals a reference
    vqa_accuracy  with three references or more: a third for each that it equals, at most 1; else as exact_match
    yes_no        1 if its first word is the "yes" or "no" of the (first) reference
    """
    if metric == "yes_no":
        answered = polarity(answer)
        return float(bool(answered) and answered == polarity(references[0]))
    own = normalise(answer)
    matches = sum(own == normalise(reference) for reference in references) if own else 0
    if metric == "vqa_accuracy" and len(references) >= AGREEING:
        return min(matches / AGREEING, 1.0)
    return float(matches > 0)


def polarity(answer: str) -> str:
    """`yes` or `no` if the answer begins with it, else empty."""
    first, *_ = normalise(answer).split() or [""]
    return first if first in ("yes", "no") else ""


def majority(metric: str, references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The one answer that earns most when it is given to every question, and its mean: what needs no image at all."""
    best, most = "", 0.0
    for answer in sorted({normalise(reference) for own in references for reference in own}):
        earned = sum(grade(metric, answer, own) for own in references) / len(references)
        if earned > most:
            best, most = answer, earned
    return best, most
