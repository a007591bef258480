from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks.continual.chain import Unit, updates_done
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.question_exam import asking
from benchmarks.continual.questions import Asked, QuestionStream, QuestionSuite, Source, about
from benchmarks.continual.report import figures, read_chains
from benchmarks.continual.run_continual import Wanted, run
from benchmarks.continual.table import markdown
from benchmarks.continual.worker import question_chain
from core.errors import ConfigError
from core.settings import Settings
from streams.publish.folders import FolderItem
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import questions

LABELS = ("boot", "coat", "dress")
METHODS = ("vlm-default", "vlm-naive")
PROTOCOL = Protocol(gflops=0.5, batch_size=4, new=6, reference=6, replay=6, items=6)


def _items(count: int) -> list[FolderItem]:
    labels = [LABELS[n % len(LABELS)] for n in range(count)]
    return [
        FolderItem(Path(f"{n:03}.png"), "", label, domain="d", inline=b"png") for n, label in enumerate(labels)
    ]  # fmt: skip


def test_half_of_the_questions_ask_what_it_is_and_half_whether_it_is() -> None:
    source = Source("clothes", "d", ("what is this?",))
    drawn = about(source, _items(90), 60)
    named = [each for each in drawn if each.metric == "exact_match"]
    closed = [each for each in drawn if each.metric == "yes_no"]
    assert len(named) == 30 and 20 <= len(closed) <= 30
    assert len({each.id for each in drawn}) == len(drawn), "no picture is drawn about twice"
    answers = defaultdict(Counter[str])
    for each in closed:
        answers[each.question.question].update(each.answers)
        right = each.question.question == f"is this a {each.question.label}?"
        assert right == (each.answers == ("yes",))
    assert all(count["yes"] == count["no"] for count in answers.values()), "words alone tell nothing"
    assert about(source, _items(90), 60) == drawn


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tiny_vlm_base(tmp_path_factory.mktemp("home"))
    folder = tmp_path_factory.mktemp("results")

    def suite(name: str, role: str) -> QuestionSuite:
        items = tuple(Asked(each, (each.answer,)) for each in questions(f"new {name}", 6))
        return QuestionSuite(name, role, items)  # type: ignore[arg-type]

    stream = QuestionStream(
        {name: questions(name, 6) for name in ("car", "boat")}, questions("house", 6),
        (suite("car", "adaptation"), suite("boat", "adaptation"), suite("house", "held-out")),
    )  # fmt: skip
    with asking(base) as vlm:
        for method in METHODS:
            question_chain(base, stream, PROTOCOL, Unit(method), folder, vlm).run(2)
        with pytest.raises(ConfigError, match="no features"):
            question_chain(base, stream, PROTOCOL, Unit(METHODS[0], order=2), folder, vlm)
    return folder


def test_there_are_no_questions_to_tune_by(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune"):
        run(Settings(home=tmp_path), Wanted(family="vlm", tune=True))


@pytest.mark.long
def test_recipes_of_a_vlm_learn_in_turn_and_are_asked_in_words(results: Path) -> None:
    reference = read_reference(results)
    assert (set(reference.adaptation), reference.held_out) == ({"car", "boat"}, ("house",))
    for method in METHODS:
        course = read_course(results, Unit(method), 2, reference)
        assert course is not None and course.order == ["car", "boat"]
        assert all(len(hits["house"]) == 6 for hits in course.hits)
        for row in updates_done(results, Unit(method).recipe, Unit(method)):
            assert row["cost"]["gflops_spent"] <= PROTOCOL.gflops
    chains = read_chains(results, METHODS, 1, 1, 2)
    outcome = figures(results, chains, METHODS, 2, PROTOCOL)
    assert outcome["methods"]["vlm-naive"]["against_default"] is not None, "compared with vlm-default"
    text = markdown(outcome)
    assert "## Learned and kept" in text and "cross versions" not in text and "nearest" not in outcome["untrained"]
