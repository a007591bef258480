"""The recipes that chains run with: their trials, and those of a VLM."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks.continual import run_tuning, tuning
from benchmarks.continual.chain import Unit, updates_done
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.question_exam import asking
from benchmarks.continual.questions import Asked, QuestionStream, QuestionSuite, Source, about
from benchmarks.continual.report import figures, read_chains
from benchmarks.continual.run_continual import methods_of
from benchmarks.continual.run_tuning import tune
from benchmarks.continual.runner import Runner
from benchmarks.continual.tuning import ORDER, UPDATES, Trial, chosen_trial, recipe_of, scaled, trials, tried
from benchmarks.continual.worker import clip_chain, question_chain
from core.errors import ConfigError
from streams.publish.folders import FolderItem
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.benchmarks.builders import PROTOCOL, stream
from tests.unit.updater.builders import questions
from updater.recipes import load_recipe


def test_every_method_has_as_many_trials_and_one_without_a_weight_more_rates() -> None:
    assert {len(trials(load_recipe(name))) for name in methods_of("clip")} == {5}
    assert all(weight == 1 for _, weight in trials(load_recipe("replay")))
    assert any(weight != 1 for _, weight in trials(load_recipe("default")))


def test_factors_move_rates_and_the_weights_beside_the_first_term() -> None:
    recipe = load_recipe("zscl")
    other = scaled(recipe, (0.5, 3.0))
    assert other.schedule.peak == 0.5 * recipe.schedule.peak and other.schedule.final == 0.5 * recipe.schedule.final
    assert [term.weight for term in other.objectives] == [1.0, 3.0 * recipe.objectives[1].weight]
    assert other.regularizers[0].weight == 3.0 * recipe.regularizers[0].weight
    assert scaled(recipe, (1.0, 1.0)) == recipe
    assert Unit("zscl", ORDER, trial=1).recipe == scaled(recipe, trials(recipe)[1])


def test_what_was_chosen_is_what_a_unit_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert recipe_of("default") == load_recipe("default"), "what the tables show is what an installation learns with"
    file = tmp_path / "tuned.json"
    rows = [[1.0, 1.0, 50.0, -0.5, 0.1], [3.0, 0.3, 51.5, -2.0, -0.4], [1.0, 3.0, 49.0, 0.0, 0.5]]
    file.write_text(json.dumps({"lwf": rows, "default": rows, "vlm-default": rows[1:2]}))
    monkeypatch.setattr(tuning, "FILE", file)
    tried.cache_clear()
    assert Unit("lwf").recipe == scaled(load_recipe("lwf"), (3.0, 0.3))
    assert recipe_of("replay") == load_recipe("replay")
    assert (chosen_trial("lwf"), chosen_trial("replay")) == (Trial(3.0, 0.3, 51.5, -2.0, -0.4), None)
    assert chosen_trial("default") == Trial(*rows[0]), "the best one whose loss is not clear of zero"
    assert chosen_trial("vlm-default") == Trial(*rows[1]), "or else the best one"
    tried.cache_clear()


@pytest.mark.long
def test_the_trials_of_each_method_are_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path)
    monkeypatch.setattr(run_tuning, "UPDATES", 2)
    runner = Runner(tmp_path, "tiny", tmp_path / "results", PROTOCOL, updates=UPDATES, jobs=1)

    def run(self: Runner, units: list[Unit]) -> bool:
        for unit in units:
            clip_chain(base, stream(), PROTOCOL, unit, self.results).run(self.updates)
        return True

    monkeypatch.setattr(Runner, "run", run)
    file = tmp_path / "tuned.json"
    done = tune(runner, ["locked-text", "naive"], file)["locked-text"]
    assert json.loads(file.read_text()) == {"locked-text": [list(trial) for trial in done]}
    assert [trial[:2] for trial in done] == list(trials(load_recipe("locked-text")))
    assert all(trial.a_zs <= trial.a_zs_high for trial in done)
    units = [Unit("locked-text", ORDER, trial=number) for number in range(5)]
    rows = [updates_done(tmp_path / "results" / "tuning", unit.recipe, unit) for unit in units]
    assert [len(each) for each in rows] == [2] * 5
    assert len({each[-1]["adapter"] for each in rows}) == 5, "each trial is another one"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"trials": json.loads(file.read_text())}


def test_half_of_the_questions_ask_what_it_is_and_half_whether_it_is() -> None:
    source = Source("clothes", "d", ("what is this?",))
    items = [
        FolderItem(Path(f"{n:03}.png"), "", ("boot", "coat", "dress")[n % 3], domain="d", inline=b"png")
        for n in range(90)
    ]
    drawn = about(source, items, 60)
    closed = [each for each in drawn if each.metric == "yes_no"]
    assert sum(each.metric == "exact_match" for each in drawn) == 30 and 20 <= len(closed) <= 30
    assert len({each.id for each in drawn}) == len(drawn), "no picture is drawn about twice"
    answers = defaultdict(Counter[str])
    for each in closed:
        answers[each.question.question].update(each.answers)
        right = each.question.question == f"is this a {each.question.label}?"
        assert right == (each.answers == ("yes",))
    assert all(count["yes"] == count["no"] for count in answers.values()), "words alone tell nothing"
    assert about(source, items, 60) == drawn


@pytest.mark.long
def test_recipes_of_a_vlm_learn_in_turn_and_are_asked_in_words(tmp_path: Path) -> None:
    base, methods = tiny_vlm_base(tmp_path), ("vlm-default", "vlm-naive")
    protocol = Protocol(gflops=0.5, batch_size=4, new=6, reference=6, replay=6, items=6)

    def suite(name: str, role: str) -> QuestionSuite:
        return QuestionSuite(name, role, tuple(Asked(each, (each.answer,)) for each in questions(f"new {name}", 6)))

    asked = QuestionStream(
        {name: questions(name, 6) for name in ("car", "boat")}, questions("house", 6),
        (suite("car", "adaptation"), suite("boat", "adaptation"), suite("house", "held-out")),
    )  # fmt: skip
    with asking(base) as vlm:
        for method in methods:
            question_chain(base, asked, protocol, Unit(method), tmp_path, vlm).run(2)
        with pytest.raises(ConfigError, match="no features"):
            question_chain(base, asked, protocol, Unit(methods[0], order=2), tmp_path, vlm)
    reference = read_reference(tmp_path)
    assert (set(reference.adaptation), reference.held_out) == ({"car", "boat"}, ("house",))
    for method in methods:
        course = read_course(tmp_path, Unit(method), 2, reference)
        assert course is not None and course.order == ["car", "boat"]
        assert all(len(hits["house"]) == 6 for hits in course.hits)
        for row in updates_done(tmp_path, Unit(method).recipe, Unit(method)):
            assert row["cost"]["gflops_spent"] <= protocol.gflops
    outcome = figures(tmp_path, read_chains(tmp_path, methods, 1, 1, 2), methods, 2, protocol)
    assert outcome["methods"]["vlm-naive"]["against_default"] is not None, "compared with vlm-default"
    assert "nearest" not in outcome["untrained"]
