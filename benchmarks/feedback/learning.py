"""A live installation learns a domain that only callers' corrections and audited answers bring, while parts are killed;
the same with hostile callers.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.feedback.callers import Callers, Question, Reviewer, correcting, hostile
from benchmarks.feedback.installation import Installation, prepared, running
from benchmarks.feedback.reconciliation import published, reconcile, stored
from benchmarks.stream.ratchet_process import wait_for
from core.digests import share_of
from core.progress import progress_log, step
from core.settings import Settings
from core.settings.serving import Feedback, Rollout
from demo.load.answers import AnswerCheck
from demo.load.probes import classify_probes
from serving.http.answer_receipts import AnswerReceipts
from serving.http.classify import probabilities
from streams.publish.folders import FolderItem, read_folder
from streams.publish.publisher import publish

STREAM: Final = "fluent3d"
DOMAIN: Final = "pixel_mshock"
"""Tiles of a game by kind; the shipped base is right about 28% of them."""
CALLERS: Final = 20
HOSTILE: Final = 0.1
PART: Final = 0.5
"""Share of the corrections that the reviewer decides when there are hostile callers."""
ASKED: Final = 0.5
"""Share of the domain's pictures that callers ask about; on the others the gain is measured."""
KILLS: Final = (0.2, 0.45, 0.7)
"""When a part is killed, as shares of the answers."""
AFTER: Final = 200
"""Answers of the release that is measured."""
QUIET_PAUSE: Final = 2.0
RESAMPLES: Final = 2000
PATIENCE_SECONDS: Final = 1800.0


@dataclass(frozen=True)
class Size:
    answers: int = 10_000
    share: float = 0.01
    """Of the answers that honest callers correct."""
    audits: float = 0.04
    updates: int = 3
    """Most updates; the run ends with the first one that is released."""
    gflops: float = 2_300.0
    """Of each update."""
    stream: int | None = None
    """Records of the other domain; None: all."""


@dataclass
class Learned:
    corrections: int
    audits: int
    answers: int
    gain: float
    interval: tuple[float, float]
    before: float
    """Share of the domain's other pictures that the base names rightly."""
    failed: int
    mixed: int
    refused: int
    updates: int
    releases: int
    verdicts: list[str]
    hostile_published: int
    hostile_released: int
    accounts: dict[str, int]
    seconds: float
    problems: list[str] = field(default_factory=list)


def questions_of(items: Sequence[FolderItem]) -> tuple[list[Question], list[Question]]:
    """Those that callers ask, and those that measure the gain; all pictures of a concept are on one side."""
    labels = tuple(sorted({item.label for item in items}))
    asked: list[Question] = []
    kept: list[Question] = []
    for item in items:
        side = asked if share_of(f"asked {item.concept}") < ASKED else kept
        side.append(Question(item.bytes(), labels, item.label))
    return asked, kept


def learn(settings: Settings, home: Path, size: Size, with_hostile: bool) -> Learned:
    """Run with a new home, where the logs stay. Raises RatchetError when a part does not start, or what is waited for
    does not come.
    """
    prepared(settings, (STREAM, DOMAIN))
    asked, kept = questions_of([*read_folder(settings.home / "data" / DOMAIN)])
    sections: dict[str, Any] = {
        "feedback": Feedback(accept=["second_caller"] if with_hostile else [], audit_share=size.audits),
        "updater": settings.updater.model_copy(update={"wait_for_items": False, "metrics_port": 0}),
        "budget": settings.budget.model_copy(update={"gflops_per_update": size.gflops, "seconds_per_update": 1e6}),
        "rollout": Rollout(guard_seconds=0.0),
    }
    began = time.monotonic()
    with running(settings, home, serve={"ingress_replicas": 2}, **sections) as live:
        found = replace(_learn(live, size, asked, kept, with_hostile), seconds=round(time.monotonic() - began, 1))
    progress_log.info(str(found))
    return found


def _learn(live: Installation, size: Size, asked: list[Question], kept: list[Question], with_hostile: bool) -> Learned:
    report = publish(live.settings, live.settings.home / "data" / STREAM, source="bench", limit=size.stream)
    wait_for(lambda: live.store.count() >= report.delivered, f"{report.delivered} samples were stored", 300)
    names = [f"caller-{number}" for number in range(CALLERS)]
    bad = names[: round(HOSTILE * CALLERS)] if with_hostile else []
    callers = Callers(
        live.settings.serve.url, live.keys(names), asked, correcting(size.share), dict.fromkeys(bad, hostile)
    )
    reviewer = Reviewer(live.ledger, asked, PART if with_hostile else 1.0)
    with callers:
        with reviewer:
            _report(live, size, callers)
            wait_for(lambda: not reviewer.waiting(), "she had decided all")
        _wait_until_stored(live, asked)
        verdicts = _update(live, size)
        seen = len(callers.answers)
        wait_for(lambda: len(callers.answers) >= seen + AFTER, f"{AFTER} more answers", PATIENCE_SECONDS)
    with step("comparing every answer"):
        return _figures(live, callers, kept, bad, verdicts)


def _report(live: Installation, size: Size, callers: Callers) -> None:
    """Let callers report, and kill parts meanwhile."""
    faults: list[Callable[[], None]] = [
        partial(live.kill_part, "ingest"), live.kill_ingress,
        partial(live.lose_broker, lambda: _is_stored(live, callers.questions)),
    ]  # fmt: skip
    with step(f"{size.answers:,} answers, some of them corrected"):
        for share, fault in zip(KILLS, faults, strict=True):
            wait_for(lambda: len(callers.answers) >= share * size.answers, "callers had answers", PATIENCE_SECONDS)  # noqa: B023
            fault()
        wait_for(lambda: len(callers.answers) >= size.answers, "callers had answers", PATIENCE_SECONDS)
    callers.reporting, callers.pause = False, QUIET_PAUSE


def _is_stored(live: Installation, questions: Sequence[Question]) -> bool:
    return published(live.ledger, questions) <= stored(live.store).keys()


def _wait_until_stored(live: Installation, questions: Sequence[Question]) -> None:
    wait_for(lambda: not live.ledger.corrections("accepted", 1), "accepted corrections were sent", PATIENCE_SECONDS)
    wait_for(lambda: _is_stored(live, questions), "published corrections were stored", 120)


def _update(live: Installation, size: Size) -> list[str]:
    """Train and judge updates until one is live. Returns the verdicts."""
    command = live.context.command("trainer", "--once", "--recipe", live.settings.updater.recipe, "--retry")
    verdicts: list[str] = []
    with (live.settings.home / "logs" / "trainer.log").open("ab") as log:
        for _ in range(size.updates):
            with step("an update"):
                subprocess.run(command, stdout=log, stderr=log, check=False)
            rows = live.ledger.verdicts(1)
            verdicts.append(rows[0].outcome if rows else "no verdict")
            if verdicts[-1] == "passed":
                wait_for(lambda: live.client.releases(1)["data"][0]["clip"] == rows[0].adapter, "its release", 300)  # noqa: B023
                break
            progress_log.info(f"the update is {verdicts[-1]}: {rows[0].summary.get('reasons') if rows else ''}")
    return verdicts


def _figures(
    live: Installation, callers: Callers, kept: list[Question], bad: list[str], verdicts: list[str]
) -> Learned:
    settings, ledger = live.settings, live.ledger
    labels, images = kept[0].labels, [each.image for each in (*callers.questions, *kept)]
    receipts = AnswerReceipts(settings.operator_key())
    stamped = [(answer, receipts.read(answer.receipt).release) for answer in callers.answers]
    check = AnswerCheck(settings, classify_probes(images, labels), images, labels, (), (), [{"p": 0, "c": 200}])
    rows = [
        {"p": answer.question, "r": release, "a": check.adapters["clip", release],
         "y": [list(answer.probabilities.values())]}
        for answer, release in stamped
    ]  # fmt: skip
    problems = [problem for problem in map(check.difference, rows) if problem]
    now = ledger.live()
    adapter = check.adapters["clip", now.number] if now else "base"
    before, after = (_hits(check, callers.questions, kept, name) for name in (check.adapters["clip", 1], adapter))
    wrong = published(ledger, callers.questions, bad) if bad else set()
    released = _train_rows(live) if "passed" in verdicts else set()
    accounts = reconcile(ledger, live.store, callers.questions, callers.acknowledged)
    said = [row for row in ledger.feedback(10**6) if row.state == "published"]
    audits = sum(row.caller == "audit" for row in said)
    return Learned(
        corrections=len(said) - audits, audits=audits, answers=len(callers.answers),
        gain=round(float(np.mean(after) - np.mean(before)), 4), interval=interval(before, after),
        before=round(float(np.mean(before)), 4), failed=len(callers.failed), mixed=len(problems),
        refused=callers.refused, updates=len(verdicts), releases=verdicts.count("passed"), verdicts=verdicts,
        hostile_published=len(wrong), hostile_released=len(wrong & released), accounts=asdict(accounts), seconds=0.0,
        problems=[*callers.failed, *problems][:5],
    )  # fmt: skip


def _train_rows(live: Installation) -> set[str]:
    """Samples that the released update may have trained on: neither held nor held out. The cap on their source may
    have left some of them out.
    """
    return set(live.store.scan(split="train", columns=["id"])["id"].to_pylist())


def _hits(check: AnswerCheck, asked: Sequence[Question], kept: Sequence[Question], adapter: str) -> npt.NDArray[Any]:
    """Which of the kept pictures an adapter names rightly, as 0 and 1."""
    vectors = check.vectors.of(adapter)
    shares = probabilities(vectors[len(asked) : check.images], vectors[check.images :], 1, 1.0)
    truths = [question.labels.index(question.truth) for question in kept]
    hits: npt.NDArray[np.float64] = (shares.argmax(axis=1) == np.array(truths)).astype(np.float64)
    return hits


def interval(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> tuple[float, float]:
    """The 95% bootstrap interval of a mean difference over pictures."""
    random = np.random.default_rng(0)
    difference = after - before
    means = [float(random.choice(difference, len(difference)).mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)
