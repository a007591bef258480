"""The pieces of `ratchet bench feedback`: how callers behave, how reports are accounted for, and the guard's test."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.feedback import callers as load
from benchmarks.feedback import run_feedback, simulation
from benchmarks.feedback.callers import Answer, Callers, Question, Reviewer
from benchmarks.feedback.learning import interval, questions_of
from benchmarks.feedback.reconciliation import published, reconcile, sample_id
from benchmarks.feedback.rollback import Wrongness
from core.ledger import Ledger
from core.ledger.rows import AUDITOR, CorrectionState, FeedbackRow, FeedbackVerdict, utc_now
from core.settings import Settings
from core.settings.serving import BaseModels
from streams.publish.folders import FolderItem
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.inputs import pictures
from tests.support.samples import sample
from tests.support.tiny import tiny_base

LABELS = ("cat", "dog", "owl")
IMAGES = pictures(4)
QUESTIONS = [Question(image, LABELS, LABELS[number % 3]) for number, image in enumerate(IMAGES)]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


def answered(number: int, label: str) -> Answer:
    return Answer(number, "a1.none", {}, label)


def test_honest_callers_correct_wrong_answers_only_and_no_more_than_their_share() -> None:
    callers = Callers("http://127.0.0.1:9", {}, QUESTIONS, load.correcting(0.25))
    said = []
    for _ in range(10):
        for number, label in enumerate(("cat", "cat")):
            callers.answers.append(answered(number, label))
            said += [(number, each) for each in load.correcting(0.25)(callers, Random(0), callers.answers[-1])]
    assert len(said) == 5
    assert all(each == (1, {"verdict": "correct", "label": "dog", "image": IMAGES[1]}) for each in said)


def test_hostile_callers_never_tell_the_truth() -> None:
    callers = Callers("http://127.0.0.1:9", {}, QUESTIONS, load.hostile)
    reports = [each for seed in range(50) for each in load.hostile(callers, Random(seed), answered(0, "cat"))]
    assert {each["verdict"] for each in reports} == {"correct", "wrong", "chosen"}
    assert {each["label"] for each in reports if each["verdict"] == "correct"} == {"dog", "owl"}


def test_callers_who_judge_say_what_is_so() -> None:
    callers = Callers("http://127.0.0.1:9", {}, QUESTIONS, load.judging(1.0))
    for label, verdict in (("cat", "right"), ("dog", "wrong")):
        assert load.judging(1.0)(callers, Random(0), answered(0, label)) == [{"verdict": verdict}]
    assert load.judging(0.0)(callers, Random(0), answered(0, "cat")) == []


def report(
    ledger: Ledger, number: int, label: str, caller: str = "caller-0", *, verdict: FeedbackVerdict = "correct",
    state: CorrectionState = "waiting",
) -> FeedbackRow:  # fmt: skip
    row = FeedbackRow(
        id=f"{number:x}{caller.encode().hex()}".ljust(64, "0"), caller=caller, release=1, route="classify",
        input="0" * 32, answered_at=utc_now(), verdict=verdict, state="waiting", image=QUESTIONS[number].image,
        detail={"label" if verdict == "correct" else "answered": label, "image_digest": QUESTIONS[number].digest},
    )  # fmt: skip
    recorded, _ = ledger.record_feedback(row)
    if state == "published":
        ledger.review_correction(recorded.id, True, actor="reviewer", reason="right")
        ledger.settle_correction(recorded.id, "published", "samples:0:0")
    return recorded


def test_the_reviewer_accepts_what_is_true_and_says_what_an_audited_picture_shows(ledger: Ledger) -> None:
    report(ledger, 0, "cat"), report(ledger, 1, "owl"), report(ledger, 2, "dog", AUDITOR, verdict="audit")
    reviewer = Reviewer(ledger, QUESTIONS)
    for row in reviewer.waiting():
        reviewer.decide(row)
    accepted = {row.caller: row for row in ledger.corrections("accepted")}
    assert accepted.keys() == {"caller-0", AUDITOR}
    assert accepted[AUDITOR].detail["label"] == "owl" and accepted[AUDITOR].verdict == "correct"
    assert [row.detail["label"] for row in ledger.corrections("dismissed")] == ["owl"]
    assert Reviewer(ledger, QUESTIONS, part=0.0).waiting() == []


def put(store: SampleStore, ids: list[str], first: int = 0) -> None:
    rows = [sample(0, first + n, id=name, domain="feedback") for n, name in enumerate(ids)]
    store.put(rows, [Position("samples", 0, first + len(ids))])


def test_every_acknowledged_report_and_published_correction_is_accounted_for(ledger: Ledger, tmp_path: Path) -> None:
    images = {question.digest: question.image for question in QUESTIONS}
    rows = [report(ledger, n, QUESTIONS[n].truth, state="published") for n in range(3)]
    same = report(ledger, 0, "cat", "caller-1", state="published")
    assert sample_id(same, images) == sample_id(rows[0], images)
    wrong = report(ledger, 3, "owl", "caller-2", state="published")
    assert published(ledger, QUESTIONS, ["caller-2", "caller-0"]) == {sample_id(wrong, images)}

    store, ids = SampleStore(str(tmp_path / "lake")), sorted(published(ledger, QUESTIONS))
    put(store, ids)
    acknowledged = {row.id for row in (*rows, same, wrong)}
    found = reconcile(ledger, store, QUESTIONS, acknowledged)
    assert (found.acknowledged, found.stored, found.published, found.samples) == (5, 5, 4, 4)
    assert (found.lost, found.double, found.unacknowledged) == (0, 0, 0)

    put(store, ids[:1], first=4)
    found = reconcile(ledger, store, QUESTIONS, {*acknowledged, "never recorded"} - {wrong.id})
    assert (found.stored, found.lost, found.double, found.unacknowledged) == (4, 1, 1, 1)

    empty = reconcile(ledger, SampleStore(str(tmp_path / "empty")), QUESTIONS, acknowledged)
    assert (empty.samples, empty.lost) == (0, 4)


def test_a_concept_is_asked_about_or_measured_and_never_both() -> None:
    items = [FolderItem(Path(f"{n}.png"), "", LABELS[n % 3], f"concept {n // 2}", inline=IMAGES[0]) for n in range(40)]
    asked, kept = questions_of(items)
    assert len(asked) + len(kept) == 40 and asked and kept
    assert len(asked) % 2 == len(kept) % 2 == 0
    assert {question.labels for question in (*asked, *kept)} == {LABELS}


def test_the_interval_of_a_gain_excludes_zero_only_where_pictures_show_it() -> None:
    before, after = np.zeros(200), np.repeat([1.0, 0.0], [20, 180])
    low, high = interval(before, after)
    assert 0 < low < 0.1 < high
    assert interval(before, before) == (0.0, 0.0)


def test_wrong_answers_of_an_adapter_are_those_that_a_server_would_give(tmp_path: Path) -> None:
    tiny_base(tmp_path)
    settings = Settings(home=tmp_path, base=BaseModels(clip="tiny", vlm=""))
    wrong = Wrongness(settings, QUESTIONS)
    texts = wrong.vectors.of("base")[len(QUESTIONS) :]
    answers = (wrong.images @ texts.T).argmax(axis=1)
    truths = [wrong.vectors.texts.index(question.truth) for question in QUESTIONS]
    assert wrong.of(None) == pytest.approx(float((answers != np.array(truths)).mean()))


def test_the_guard_on_feedback_is_measured_with_the_guards_own_test(tmp_path: Path) -> None:
    figures = run_feedback.run(Settings(home=tmp_path), tmp_path, ["simulation"], streams=4, most=1500, rate=0.3)
    assert (figures["false_rollbacks"], figures["hostile_rollbacks"]) == (0.0, 0.0)
    assert simulation.answers_to_rollback(np.random.default_rng(0), 0.05, 0.5, 0.0, 1000) in range(10, 100)
    assert simulation.answers_to_rollback(np.random.default_rng(0), 0.05, 0.0, 0.9, 1000) is not None
    run_feedback.show(figures)
    assert run_feedback.violations(figures) == []
    assert run_feedback.violations({**figures, "lost": 1, "gain": 0.1, "gain_interval": (-0.1, 0.2)}) == [
        "lost 1", "gain 0.1",
    ]  # fmt: skip
