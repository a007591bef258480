"""The recipes that chains run with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.continual import tuning
from benchmarks.continual.chain import Unit
from benchmarks.continual.tuning import Trial, chosen_trial, recipe_of, scaled, tried
from updater.recipes import load_recipe


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
