from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.continual import run_tuning, tuning
from benchmarks.continual.chain import Unit, updates_done
from benchmarks.continual.run_continual import methods_of
from benchmarks.continual.run_tuning import tune
from benchmarks.continual.runner import Runner
from benchmarks.continual.tuning import ORDER, UPDATES, Trial, chosen_trial, recipe_of, scaled, trials, tried
from benchmarks.continual.worker import clip_chain
from tests.support.tiny import tiny_base
from tests.unit.benchmarks.builders import PROTOCOL, stream
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


def test_the_default_runs_as_its_recipe_is_written() -> None:
    assert recipe_of("default") == load_recipe("default"), "what the tables show is what an installation learns with"


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
    complete = tune(runner, ["locked-text", "naive"], file)
    assert json.loads(file.read_text()) == {"locked-text": [list(trial) for trial in complete["locked-text"]]}
    assert [trial[:2] for trial in complete["locked-text"]] == list(trials(load_recipe("locked-text")))
    assert all(trial.a_zs <= trial.a_zs_high for trial in complete["locked-text"])
    rows = [
        updates_done(tmp_path / "results" / "tuning", u.recipe, u)
        for u in (Unit("locked-text", ORDER, trial=t) for t in range(5))
    ]
    assert [len(each) for each in rows] == [2] * 5
    assert len({each[-1]["adapter"] for each in rows}) == 5, "each trial is another one"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"trials": json.loads(file.read_text())}
