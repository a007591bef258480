"""Evaluation of a VLM before its first update and after each: every question of all suites, decoded greedily."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual.evaluation import Bools
from benchmarks.continual.exam import ZERO_SHOT, packed
from benchmarks.continual.nearest import NAME as NEAREST
from benchmarks.continual.orders import Means, order_of
from benchmarks.continual.questions import Asked, QuestionStream
from core.errors import ConfigError
from core.settings.serving import Serve
from ratchet_client.images import decode_image
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_engine import TransformersEngine
from serving.engines.vlm.open import SyncVlm
from serving.engines.vlm.vlm_base import VlmBase
from updater.gate.suite_items import grade
from updater.training.checkpoint import write_json

TOKENS = 12
"""No right answer is longer."""
GREY = 128
ORDERS = 2
"""As listed, and a random one: the others need features of pictures."""


def asking(base: VlmBase) -> SyncVlm:
    serve = Serve(vlm_engine="transformers", vlm_max_tokens=TOKENS, vlm_context=512, vlm_threads=1)
    return SyncVlm(TransformersEngine(base, serve))


class QuestionExam:
    """Implements :class:`benchmarks.continual.exam.Exam`."""

    def __init__(self, vlm: SyncVlm, stream: QuestionStream, results: Path, trial_updates: int = 0) -> None:
        """``vlm``: of :func:`asking`, entered. ``results``: of all chains of a base. ``trial_updates``: of a trial of
        the tuning search, which is asked after the last of them alone, and not blind."""
        self.vlm, self.stream, self.trial_updates = vlm, stream, trial_updates
        path = results / ZERO_SHOT
        if not path.is_file():
            results.mkdir(parents=True, exist_ok=True)
            known = {
                "roles": {suite.name: suite.role for suite in stream.suites},
                "outside": [suite.name for suite in stream.suites if suite.outside],
                "hits": packed(self._hits(None)),
                "blind": packed(self._hits(None, blind=True)),
                NEAREST: {},
            }
            write_json(path, known)

    def order(self, number: int) -> list[str]:
        """Raises ConfigError for an order by similarity of pictures, which questions do not have."""
        return order_of(self.stream, number, _no_means)

    def after(self, number: int, adapter: Path) -> dict[str, Any]:
        if number + 1 < self.trial_updates:
            return {"hits": {}}
        self.vlm.load(adapter.name, adapter)
        try:
            answers = {"hits": packed(self._hits(adapter.name))}
            return answers if self.trial_updates else answers | {"blind": packed(self._hits(adapter.name, blind=True))}
        finally:
            self.vlm.unload(adapter.name)

    def kept(self, number: int) -> None:
        pass

    def _hits(self, adapter: str | None, blind: bool = False) -> dict[str, Bools]:
        """By suite: whether each question was answered correctly, [n, 1]. ``blind``: with a grey picture for each."""
        hits = {}
        for suite in self.stream.suites:
            asks = [question(_picture(each, blind), each.question.question, TOKENS) for each in suite.items]
            label = f"{suite.name}, {adapter or 'base'}{', blind' if blind else ''}"
            replies = self.vlm.replies(asks, adapter, label=label)
            right = [grade(i.metric, r.text, i.answers) == 1 for r, i in zip(replies, suite.items, strict=True)]
            hits[suite.name] = np.array(right, bool)[:, None]
        return hits


def _picture(asked: Asked, blind: bool) -> np.ndarray:
    picture = np.array(decode_image(asked.question.read()).convert("RGB"))
    return np.full_like(picture, GREY) if blind else picture


def _no_means() -> Means:
    raise ConfigError("a VLM has no features of pictures to order its updates by.", f"Choose --orders up to {ORDERS}.")
