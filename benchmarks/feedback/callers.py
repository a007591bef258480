"""Callers that classify pictures with keys of their own, and report the answers; a reviewer who knows the labels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random
from types import TracebackType
from typing import Any, Final

from core.ledger import Ledger
from core.ledger.rows import AUDITOR, FeedbackRow
from ratchet_client import Client, Overloaded, ServerError, last_answer

RETRIES: Final = 8
"""An HTTP process that was killed is back within seconds."""
WORKERS: Final = 6
HITS: Final = 5


@dataclass(frozen=True, slots=True)
class Question:
    image: bytes = field(repr=False)
    labels: tuple[str, ...]
    truth: str

    @property
    def digest(self) -> str:
        """As in the detail of a report."""
        return sha256(self.image).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Answer:
    question: int
    receipt: str
    probabilities: dict[str, float]
    label: str


Report = dict[str, Any]
"""Arguments of :meth:`ratchet_client.Client.feedback`."""
Behaviour = Callable[["Callers", Random, Answer], Iterable[Report]]
"""Reports of a caller on one of its answers."""


class Callers:
    """Threads that ask in the names of the callers until the end of the block.

    >>> with Callers(url, {"caller-0": token}, questions, correcting(0.01)) as callers:
    ...     wait_for(lambda: len(callers.answers) >= 1000, "1,000 answers")
    """

    def __init__(
        self, url: str, keys: dict[str, str], questions: Sequence[Question], behaviour: Behaviour,
        others: Mapping[str, Behaviour] | None = None,
    ) -> None:  # fmt: skip
        """``keys``: tokens by caller. ``others``: behaviour of single callers."""
        self.questions = questions
        self.answers: list[Answer] = []
        self.acknowledged: dict[str, str] = {}
        """Caller by ID of the report."""
        self.corrected = 0
        self.failed: list[str] = []
        self.refused = 0
        """Reports over a caller's limits."""
        self.pause = 0.0
        """Seconds between the requests of one thread."""
        self.reporting = True
        self.lock = threading.Lock()
        self._stack = ExitStack()
        self._clients = {
            name: self._stack.enter_context(Client(url, token, retries=RETRIES)) for name, token in keys.items()
        }
        self._behaviours = dict.fromkeys(keys, behaviour) | dict(others or {})
        self._stop = threading.Event()
        randoms = [Random(number) for number in range(WORKERS)]  # noqa: S311  no secret
        self._threads = [threading.Thread(target=self._work, args=(each,)) for each in randoms]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._stack.close()

    def _work(self, random: Random) -> None:
        while not self._stop.is_set():
            caller = random.choice([*self._clients])
            client = self._clients[caller]
            try:
                answer = self._ask(client, random.randrange(len(self.questions)))
                for report in self._behaviours[caller](self, random, answer) if self.reporting else ():
                    self._report(caller, client, answer, report)
            except ServerError as error:
                self.failed.append(f"{type(error).__name__}: {error}"[:300])
            self._stop.wait(self.pause)

    def _ask(self, client: Client, number: int) -> Answer:
        question = self.questions[number]
        (found,) = client.classify([question.image], question.labels)
        answer = Answer(number, last_answer(), found["probabilities"], found["label"])
        self.answers.append(answer)
        return answer

    def _report(self, caller: str, client: Client, answer: Answer, report: Report) -> None:
        receipt = answer.receipt
        if report["verdict"] == "chosen":
            found = client.search(answer.label, k=HITS)
            if not found:  # nothing is embedded yet
                return
            receipt, report = last_answer(), {**report, "position": len(found) - 1}
        try:
            told = client.feedback(receipt, **report)
            self.acknowledged[told["id"]] = caller
        except Overloaded as error:
            if error.code != "rate_limited":
                raise
            self.refused += 1
        except ServerError as error:
            if error.code != "feedback_exists":  # the same answer within one second, and another random label
                raise


def correcting(share: float) -> Behaviour:
    """Correct wrong answers truthfully, as many as this share of all answers."""

    def reports(callers: Callers, random: Random, answer: Answer) -> Iterable[Report]:
        question = callers.questions[answer.question]
        with callers.lock:
            due = answer.label != question.truth and callers.corrected < share * len(callers.answers)
            callers.corrected += due
        return [{"verdict": "correct", "label": question.truth, "image": question.image}] if due else []

    return reports


def judging(share: float) -> Behaviour:
    """Say of this share of the answers truthfully whether they are right."""

    def reports(callers: Callers, random: Random, answer: Answer) -> Iterable[Report]:
        right = answer.label == callers.questions[answer.question].truth
        return [{"verdict": "right" if right else "wrong"}] if random.random() < share else []

    return reports


def hostile(callers: Callers, random: Random, answer: Answer) -> Iterable[Report]:
    """Of every answer a wrong correction, or that it is wrong; of a search, a click on the last hit."""
    question = callers.questions[answer.question]
    label = random.choice([each for each in question.labels if each != question.truth])
    wrong = {"verdict": "correct", "label": label, "image": question.image}
    return [random.choice([wrong, {"verdict": "wrong"}]), {"verdict": "chosen"}]


class Reviewer:
    """Decides corrections and audits truthfully, of a random part of them, until the end of the block."""

    def __init__(self, ledger: Ledger, questions: Sequence[Question], part: float = 1.0) -> None:
        self.ledger = ledger
        self.part = part
        self._truths = {question.digest: question.truth for question in questions}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Reviewer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def waiting(self) -> list[FeedbackRow]:
        """Those that she will decide: all audits, and her part of the corrections, by their IDs."""
        rows = self.ledger.corrections("waiting", 500)
        return [row for row in rows if row.caller == AUDITOR or int(row.id[:8], 16) < self.part * 16**8]

    def decide(self, row: FeedbackRow) -> None:
        truth = self._truths[row.detail["image_digest"]]
        accept = row.verdict == "audit" or row.detail["label"] == truth
        label = truth if row.verdict == "audit" else None
        self.ledger.review_correction(row.id, accept, actor="reviewer", reason="looked at it", label=label)

    def _work(self) -> None:
        while not self._stop.wait(0.2):
            for row in self.waiting():
                self.decide(row)
