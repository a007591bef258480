"""Releases that are wrong in five points more of the answers, forced live under load, until what callers report takes
them back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from benchmarks.feedback.callers import Callers, Question, judging
from benchmarks.feedback.installation import Installation, prepared, running
from benchmarks.feedback.simulation import BEFORE, CALLERS, first_alarm
from benchmarks.stream.ratchet_process import wait_for
from core.artifacts import Artifacts
from core.errors import RatchetError
from core.ledger.wrong_answers import ROUTES, Reports, highest_rate
from core.progress import progress_log, step
from core.settings import Settings
from core.settings.serving import Rollout
from demo.load.answers import ExpectedVectors
from serving.releases.types import BASE
from streams.publish.folders import read_folder
from tests.support.inputs import random_adapter

DOMAIN: Final = "noto"
PICTURES: Final = 400
ADDED: Final = 0.05
CLOSE: Final = 0.01
STEPS: Final = 12
SCALES: Final = (0.2, 0.6)
"""Size of the change of the texts' side, relative to the weights."""
PATIENCE_SECONDS: Final = 3000.0


@dataclass(frozen=True)
class TakenBack:
    incumbent_rate: float
    """Wrong answers of the incumbent among all questions, as a share."""
    added: float
    answers: int
    """Reports until the release was taken back; the guard counts them once a minute."""
    needed: int | None
    """Reports after which the guard's test would have taken it back, looking at every ten."""
    failed: int
    reason: str


class Wrongness:
    """Shares of the questions that adapters answer wrongly."""

    def __init__(self, settings: Settings, questions: list[Question]) -> None:
        texts = sorted({label for question in questions for label in question.labels})
        self.vectors = ExpectedVectors(settings, [question.image for question in questions], texts)
        places = {text: number for number, text in enumerate(texts)}
        self.labels = np.array([[places[label] for label in question.labels] for question in questions])
        self.truths = np.array([question.labels.index(question.truth) for question in questions])
        self.images = self.vectors.of(BASE)[: len(questions)]

    def of(self, adapter: str | None) -> float:
        """Share of an adapter that is loaded, and changes no image vector; None: the base."""
        texts = self.vectors.engine.encode_texts(self.vectors.texts, adapter)
        scores = np.einsum("nd,nld->nl", self.images, texts[self.labels])
        return float((scores.argmax(axis=1) != self.truths).mean())


def two_choices(settings: Settings) -> list[Question]:
    """Pictures, each with its name and another one's."""
    items = [item for item in read_folder(settings.home / "data" / DOMAIN, split="train") if item.text][:PICTURES]
    random = Random(0)  # noqa: S311  no secret
    questions = []
    for item in items:
        other = random.choice([each.text for each in items if each.text != item.text])
        questions.append(Question(item.bytes(), tuple(sorted((item.text, other))), item.text))
    return questions


def worse_adapter(live: Installation, wrong: Wrongness, folder: Path, seed: int) -> tuple[str, float]:
    """Register random weights of the size that adds :data:`ADDED` wrong answers. Returns their name and what they add.
    Raises RatchetError if no size is close.
    """
    base, engine, rate = wrong.vectors.engine.base, wrong.vectors.engine, wrong.of(None)
    low, high = SCALES
    for number in range(STEPS):
        scale, place = (low + high) / 2, folder / str(number)
        name = random_adapter(base, place, seed, parts=["text"], scale=scale)
        spaces = engine.load(name, place)
        added = wrong.of(name) - rate
        engine.unload(name)
        if abs(added - ADDED) < CLOSE:
            Artifacts(live.settings.artifacts).put_directory(place, f"adapters/{name}")
            live.ledger.register_adapter(
                name, family="clip", base=base.digest, image_space=spaces.image, text_space=spaces.text,
                meta={"made_by": "ratchet bench"},
            )  # fmt: skip
            return name, round(added, 4)
        low, high = (scale, high) if added < ADDED else (low, scale)
    raise RatchetError(f"no random adapter of seed {seed} adds {ADDED:.0%} wrong answers.", "Choose another seed.")


def take_back(settings: Settings, home: Path, runs: int, share: float = 1.0) -> list[TakenBack]:
    """Run with a new home. ``share``: of the answers that callers report. Raises RatchetError when a release is not
    taken back.
    """
    prepared(settings, [DOMAIN])
    # Only what callers report can take a release back.
    rollout = Rollout(guard_seconds=1.0, compare_share=0.0, min_agreement=0.0)
    with running(settings, home, ["serve"], rollout=rollout) as live:
        questions = two_choices(live.settings)
        wrong = Wrongness(live.settings, questions)
        return [_take_back(live, wrong, questions, home / "random" / str(n), n, share) for n in range(runs)]


def _take_back(
    live: Installation, wrong: Wrongness, questions: list[Question], folder: Path, seed: int, share: float
) -> TakenBack:
    with step("finding a worse adapter"):
        name, added = worse_adapter(live, wrong, folder, seed)
    keys = live.keys([f"caller-{seed}-{number}" for number in range(CALLERS)])
    incumbent = live.client.live()
    with Callers(live.settings.serve.url, keys, questions, judging(share)) as callers, step("taking it back"):
        wait_for(lambda: _reports(live, incumbent).of >= BEFORE, "reports on the incumbent", PATIENCE_SECONDS)
        number = int(live.client.release(name, reason="bench", force=True)["number"])
        wait_for(lambda: live.client.live() != number, "the rollback", PATIENCE_SECONDS)
    back = live.ledger.release(number + 1)
    rows = [row for row in live.ledger.feedback(10**6, release=number) if row.created_at < back.created_at]
    rows.sort(key=lambda row: row.created_at)
    known = {caller: place for place, caller in enumerate(sorted(keys))}
    said = np.array([row.verdict == "wrong" for row in rows])
    before = Reports.sum(
        live.ledger.feedback_by_caller(incumbent, ROUTES["clip"], before=live.ledger.release(number).created_at)
    )
    needed = first_alarm(np.array([known[row.caller] for row in rows]), said, highest_rate(before))
    reason: dict[str, Any] = live.client.releases(1)["data"][0]
    progress_log.info(f"taken back after {len(rows)} reports: {reason['reason']}")
    return TakenBack(round(wrong.of(None), 4), added, len(rows), needed, len(callers.failed), str(reason["reason"]))


def _reports(live: Installation, release: int) -> Reports:
    return Reports.sum(live.ledger.feedback_by_caller(release, ROUTES["clip"]))
