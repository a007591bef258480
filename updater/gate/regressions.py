"""The items a candidate got wrong that were right before, to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from core.errors import GateError
from updater.gate.score import Outcomes, Scorer
from updater.gate.suite_items import Item, open_picture
from updater.gate.suites import Suite
from updater.gate.verdict import Regression

SIDE = 96
"""Longest side of a thumbnail, in pixels: a dozen for each of ten suites stay below 0.5 MB."""
MOST = 12
MOST_CHARS = 200


def worst_items(
    scorer: Scorer, suite: Suite, before: Outcomes, after: Outcomes, most: int = MOST
) -> tuple[Regression, ...]:
    """Hits that became misses, the deepest fall first; an item is shown once, in its worse view."""
    fall = np.where((before.hits > after.hits), after.ranks - before.ranks, 0)
    view = fall.argmax(axis=1)
    depth = fall.max(axis=1)
    order = np.lexsort((before.ids, -depth))[:most]
    choices = [_choices(scorer, suite, number) for number in range(len(suite.views))]
    return tuple(
        _worse(
            suite.items()[i],
            suite.views[view[i]],
            (int(before.ranks[i, view[i]]), int(after.ranks[i, view[i]])),
            (choices[view[i]][before.answers[i, view[i]]], choices[view[i]][after.answers[i, view[i]]]),
        )
        for i in order
        if depth[i] > 0
    )


def worst_answers(
    suite: Suite,
    before: tuple[Sequence[str], NDArray[np.float64]],
    after: tuple[Sequence[str], NDArray[np.float64]],
    most: int = MOST,
) -> tuple[Regression, ...]:
    """Questions that earned more before, the deepest fall first; both arguments are answers and what they earned."""
    items, fall = suite.items(), before[1] - after[1]
    order = np.lexsort((np.array([item.id for item in items]), -fall))[:most]
    return tuple(
        _worse(items[i], "answer", (int(before[1][i] < 1.0), 1), (before[0][i], after[0][i]))
        for i in order
        if fall[i] > 0
    )


def _choices(scorer: Scorer, suite: Suite, view: int) -> Sequence[Item | str]:
    """Possible answers in a view: items where it is their image, or their caption and they are samples."""
    items = suite.items()
    if suite.views[view] == "text to image":
        return items
    by_text: dict[str, Item | str] = {item.text: item for item in items if item.sample_id}
    return [by_text.get(text, text) for text in scorer.choices(suite)[view]]


def _worse(item: Item, view: str, ranks: tuple[int, int], answers: tuple[Item | str, Item | str]) -> Regression:
    shown = not item.sample_id  # what a model answers to a sample's question may repeat the sample
    before, after = (_shown(answer) if shown else "" for answer in answers)
    return Regression(
        id=item.id,
        text=_shown(item),
        view=view,
        rank_before=ranks[0],
        rank_after=ranks[1],
        answer_before=before,
        answer_after=after,
        thumbnail=thumbnail(item) if shown else "",
        expected=", ".join(dict.fromkeys(item.answers))[:MOST_CHARS] if shown else "",
        sample=item.sample_id,
        sample_before=_sample_id(answers[0]),
        sample_after=_sample_id(answers[1]),
    )


def _shown(answer: Item | str) -> str:
    """Its text; none of a sample."""
    if isinstance(answer, str):
        return answer[:MOST_CHARS]
    return "" if answer.sample_id else answer.text[:MOST_CHARS]


def _sample_id(answer: Item | str) -> str:
    return "" if isinstance(answer, str) else answer.sample_id


def thumbnail(item: Item) -> str:
    """JPEG data URI of at most SIDE pixels; empty if the image cannot be read."""
    try:
        image = open_picture(item)
    except GateError:
        return ""
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
