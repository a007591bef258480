"""The items a candidate got wrong that were right before, to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ops.errors import GateError
from updater.gate.items import Item, open_picture
from updater.gate.score import Outcomes, Scorer
from updater.gate.suites import Suite
from updater.gate.verdict import Worse

SIDE = 96
"""Longest side of a thumbnail, in pixels: a dozen for each of ten suites stay below 0.5 MB."""
MOST = 12


def worst_items(scorer: Scorer, suite: Suite, before: Outcomes, after: Outcomes, most: int = MOST) -> tuple[Worse, ...]:
    """Hits that became misses, the deepest fall first; an item is shown once, in its worse view."""
    fall = np.where((before.hits > after.hits), after.ranks - before.ranks, 0)
    view = fall.argmax(axis=1)
    depth = fall.max(axis=1)
    order = np.lexsort((before.ids, -depth))[:most]
    items, choices = suite.items(), scorer.choices(suite)
    captions = [
        choices[v] if suite.views[v] != "text to image" else [item.text for item in items]
        for v in range(len(suite.views))
    ]
    return tuple(
        Worse(
            id=items[i].id,
            text=items[i].text[:200],
            view=suite.views[view[i]],
            rank_before=int(before.ranks[i, view[i]]),
            rank_after=int(after.ranks[i, view[i]]),
            answer_before=captions[view[i]][before.answers[i, view[i]]][:200],
            answer_after=captions[view[i]][after.answers[i, view[i]]][:200],
            thumbnail=thumbnail(items[i]),
        )
        for i in order
        if depth[i] > 0
    )


def worst_answers(
    suite: Suite,
    before: tuple[Sequence[str], NDArray[np.float64]],
    after: tuple[Sequence[str], NDArray[np.float64]],
    most: int = MOST,
) -> tuple[Worse, ...]:
    """Questions that earned more before, the deepest fall first; both arguments are answers and what they earned."""
    items, fall = suite.items(), before[1] - after[1]
    order = np.lexsort((np.array([item.id for item in items]), -fall))[:most]
    return tuple(
        Worse(
            id=items[i].id,
            text=items[i].text[:200],
            view="answer",
            rank_before=int(before[1][i] < 1.0),
            rank_after=1,
            answer_before=before[0][i][:200],
            answer_after=after[0][i][:200],
            thumbnail=thumbnail(items[i]),
            expected=", ".join(dict.fromkeys(items[i].answers))[:200],
        )
        for i in order
        if fall[i] > 0
    )


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
