"""The chapters of the demo: what happens in each, why it matters, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Chapter:
    """One part of the story. Times are monotonic seconds."""

    name: str
    """Names it to the program, and in the summary."""
    title: str
    why: str
    began: float | None = None
    ended: float | None = None

    def seconds(self) -> float:
        """How long it has taken so far."""
        if self.began is None:
            return 0.0
        return (time.monotonic() if self.ended is None else self.ended) - self.began


def plan_chapters(domain: str, questions: str = "") -> list[Chapter]:
    """The plan. ``domain``: what the stream brings to CLIP. ``questions``: what it brings to the VLM; empty: no VLM."""
    plan = [
        Chapter(
            "start", "A base model, a broker, a server and a console start",
            "Everything runs on this machine, on what package registries ship. The server answers as soon as CLIP is "
            "there; what gate and trainer will need is drawn beside.",
        ),
        Chapter(
            "stream", f"The stream brings pictures that the base has not seen: {domain}",
            "Samples arrive through Kafka, exactly once. They can be found seconds later, before anything has learned "
            "from them. From now on a steady load asks the server, and every answer will be checked.",
        ),
        Chapter(
            "naive", "A naive update is trained, and the gate rejects it",
            "Training on the new data alone learns it, and forgets what the model could do before. Regression tests on "
            "held-out data find out before any client does.",
        ),
        Chapter(
            "default", "The default update is trained, passes the gate, and is swapped in under the load",
            "It is held to what the model knew, so that every suite stays inside its margin. Each request is answered "
            "by one release alone; none fails, and none mixes two.",
        ),
        Chapter(
            "rollback", "An operator takes the update back, and forward again",
            "The model before stays in memory, and its search index complete: going back takes milliseconds.",
        ),
        Chapter(
            "compare", "The same searches before and after the update",
            "Scores say how much was learned; pictures say what. Both releases are loaded, and each is asked by name.",
        ),
    ]  # fmt: skip
    if questions:
        plan += [
            Chapter(
                "questions", f"The stream brings questions about images that the VLM has not seen: {questions}",
                "The same stream, the same store: a sample is an image with a text, or with a question and its answer.",
            ),
            Chapter(
                "vlm-naive", "A naive VLM update is trained, and the gate rejects it",
                "A generative model forgets as well: what it answered right before, it now answers with the new words.",
            ),
            Chapter(
                "vlm-default", "The default VLM update is trained, passes the gate, and is swapped in under the load",
                "CLIP goes on as it is: the two models are released and taken back independently.",
            ),
            Chapter(
                "vlm-rollback", "An operator takes the VLM back alone, and forward again",
                "An answer that is being written goes on with the release that it began with.",
            ),
        ]  # fmt: skip
    return [
        *plan,
        Chapter(
            "check", "Every answer is compared with the release that it was stamped with",
            "Engines that share nothing with the server but files say what each release must answer.",
        ),
    ]  # fmt: skip


class StoryProgress:
    """Which chapter is being told. Reading it from another thread is safe."""

    def __init__(self, plan: Sequence[Chapter]) -> None:
        self.plan = tuple(plan)
        self.began = time.monotonic()

    @property
    def current(self) -> Chapter | None:
        """The one that has begun and not ended."""
        return next((each for each in self.plan if each.began is not None and each.ended is None), None)

    def number(self, chapter: Chapter) -> int:
        """From 1."""
        return self.plan.index(chapter) + 1

    @contextmanager
    def chapter(self, name: str) -> Iterator[Chapter]:
        """The time inside is that of the chapter ``name``."""
        chapter = next(each for each in self.plan if each.name == name)
        chapter.began = time.monotonic()
        try:
            yield chapter
        finally:
            chapter.ended = time.monotonic()

    def seconds(self) -> dict[str, float]:
        """Of every chapter so far, by name."""
        return {each.name: each.seconds() for each in self.plan if each.began is not None}
