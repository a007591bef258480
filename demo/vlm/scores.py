"""Scores of a VLM on a folder's questions, compared with answers that do not see the image. Per kind of question, as
fractions of 1: ``model``; ``majority``, the best single answer; and ``blind``, the better of the model with a blank
image and the most frequent training answer to the same words. ``assets/scores.json`` has those of the shipped VLM."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.progress import progress_log, track
from demo.data import prepare_questions
from demo.vlm.shipped import ASSETS, TRAINED_ON
from ratchet_client.images import open_accepted
from serving.engines.vlm.generation import Image, question
from serving.engines.vlm.prompts import inputs
from serving.engines.vlm.vlm_base import VlmBase
from streams.publish.folders import FolderItem, read_folder

SCORES = "scores.json"
BATCH = 48
MAX_TOKENS = 12
"""Answers to the demo questions are shorter."""


def score_vlm(
    base: VlmBase, name: str = TRAINED_ON, limit: int | None = None, home: Path | None = None
) -> dict[str, dict[str, float]]:
    """Scores by kind of question on the test split of dataset `name`: ``model``, ``majority``, ``blind``, ``items``. At
    most `limit` items per kind. The dataset is made in `home` (default: the base's) if it is missing."""
    folder = prepare_questions(name, home or base.directory.parent.parent)
    by_kind: dict[str, list[FolderItem]] = defaultdict(list)
    for item in read_folder(folder, "test"):
        if limit is None or len(by_kind[item.label]) < limit:
            by_kind[item.label].append(item)
    habits = usual_answers(read_folder(folder, "train"))
    model, processor = base.build_model(), base.processor()
    result: dict[str, dict[str, float]] = {}
    for kind, items in sorted(by_kind.items()):
        replies = answer(model, processor, items, label=f"{name} {kind}")
        blank = answer(model, processor, items, label=f"{name} {kind}, blank images", blank=True)
        guesses = [habits.get(item.question, "") for item in items]
        result[kind] = {
            "model": accuracy(items, replies),
            "majority": max(accuracy(items, [a] * len(items)) for a in sorted({i.answer for i in items})),
            "blind": max(accuracy(items, blank), accuracy(items, guesses)),
            "items": len(items),
        }
        progress_log.info(f"{name} {kind}: " + ", ".join(f"{key} {value:.3g}" for key, value in result[kind].items()))
    return result


@torch.inference_mode()
def answer(
    model: Any, processor: Any, items: Sequence[FolderItem], label: str = "answering", blank: bool = False
) -> list[str]:
    """Greedy answers; with `blank`, to a white image."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].question), items[i].question))
    replies = [""] * len(items)
    for start in track(range(0, len(order), BATCH), label):
        rows = order[start : start + BATCH]
        pixels = [_white() if blank else np.asarray(open_accepted(items[i].bytes()).decode()) for i in rows]
        asks = [question(image, items[i].question) for image, i in zip(pixels, rows, strict=True)]
        batch = inputs(processor, asks)
        tokens = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False)
        texts = processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            replies[i] = text
    return replies


def accuracy(items: Sequence[FolderItem], replies: Sequence[str]) -> float:
    """Share of replies that equal one of the item's answers, ignoring case."""
    right = [
        reply.strip().casefold() in {a.casefold() for a in (item.answer, *item.answers)}
        for item, reply in zip(items, replies, strict=True)
    ]
    return round(sum(right) / len(right), 4)


def committed_scores() -> dict[str, dict[str, float]]:
    scores: dict[str, dict[str, float]] = json.loads((ASSETS / SCORES).read_text())["kinds"]
    return scores


def usual_answers(items: Sequence[FolderItem]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        counts[item.question][item.answer] += 1
    return {question: min(seen, key=lambda a: (-seen[a], a)) for question, seen in counts.items()}


def _white() -> Image:
    return np.full((64, 64, 3), 255, np.uint8)
