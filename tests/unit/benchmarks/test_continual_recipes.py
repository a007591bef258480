"""The recipes that chains run with."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.continual import run_continual, run_tuning, tuning
from benchmarks.continual.chain import Unit, chain_name, update_path
from benchmarks.continual.nearest import NAME as NEAREST
from benchmarks.continual.noise import with_noise
from benchmarks.continual.tuning import (
    ORDER,
    TRIALS,
    UPDATES,
    Trial,
    chosen_trial,
    factor,
    has_second,
    is_inside,
    next_place,
    recipe_of,
    scaled,
    tried,
)
from benchmarks.continual.variants import FRAMED, framed, recipe_named
from updater.data.pools import Pair
from updater.recipes import load_recipe


def test_what_was_chosen_is_what_a_unit_and_its_variants_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert recipe_of("default") == load_recipe("default"), "what the tables show is what an installation learns with"
    file = tmp_path / "tuned.json"
    rows = [[0, 0, 50.0, -0.5, 0.1], [1, -1, 51.5, -2.0, -0.4], [0, 1, 49.0, 0.0, 0.5]]
    file.write_text(json.dumps({"lwf": rows, "default": rows, "vlm-default": rows[1:2]}))
    monkeypatch.setattr(tuning, "FILE", file)
    tried.cache_clear()
    assert Unit("lwf").recipe == scaled(load_recipe("lwf"), (1, -1))
    assert Unit("lwf.framed").recipe == scaled(framed(load_recipe("lwf")), (1, -1))
    assert recipe_of("replay") == load_recipe("replay")
    assert (chosen_trial("lwf"), chosen_trial("replay")) == (Trial(1, -1, 51.5, -2.0, -0.4), None)
    assert chosen_trial("default") == Trial(*rows[0]), "the best one whose loss is not clear of zero"
    assert chosen_trial("vlm-default") == Trial(*rows[1]), "or else the best one"
    tried.cache_clear()


def test_a_place_scales_rates_and_the_second_knob() -> None:
    assert [factor(power) for power in (-2, -1, 0, 1, 2, 3)] == [0.1, 0.3, 1, 3, 10, 30]
    lwf, made = load_recipe("lwf"), scaled(load_recipe("lwf"), (1, -1))
    assert made.schedule.peak == pytest.approx(3 * lwf.schedule.peak)
    assert [t.weight for t in made.objectives[1:]] == pytest.approx([0.3 * t.weight for t in lwf.objectives[1:]])
    assert made.objectives[0] == lwf.objectives[0]
    wise = scaled(load_recipe("wise-ft"), (0, 1))
    assert wise.merge.weight == pytest.approx(0.75), "odds of 1 to 1, times 3"
    assert not has_second(load_recipe("lora")) and has_second(load_recipe("wise-ft"))


def test_a_search_leaves_the_edge_and_takes_as_many_trials_for_each() -> None:
    for name, best in (("lwf", (2, 1)), ("lora", (-2, 0)), ("default", (0, 0))):
        recipe, done = load_recipe(name), list[Trial]()
        while place := next_place(recipe, done):
            distance = sum(abs(a - b) for a, b in zip(place, best, strict=True))
            done.append(Trial(*place, -distance, 0.0, 0.0))
        assert len(done) == len({trial.place for trial in done}) == TRIALS
        assert max(done, key=lambda trial: trial.gm).place == best or name == "lwf"
        assert is_inside(recipe, done) or name == "lwf"


def test_every_variant_is_a_recipe_of_its_own() -> None:
    default = load_recipe("default")
    variants = run_continual.variants_of("clip")
    made = {name: recipe_named(name) for name in variants}
    assert {recipe.name for recipe in made.values()} == set(variants)
    digests = {recipe.model_copy(update={"name": "x"}).digest for recipe in (default, *made.values())}
    assert len(digests) > len(variants) / 2
    for name, recipe in made.items():
        if name.endswith(FRAMED):
            assert recipe.mixture == default.mixture
            own = load_recipe(name.partition(".")[0]).merge
            assert recipe.merge == (default.merge if own.rule == "none" else own)
    assert "default.framed" not in made and "cosine.framed" not in made, "they are in the frame"
    without = made["default.undistilled"]
    assert [term.name for term in without.objectives] == ["contrastive"]
    assert made["default.without-replay"].mixture.replay == made["default.new-alone"].mixture.reference == 0
    assert made["default.unmerged"].merge.rule == "none" and made["wise-ft.25"].merge.weight == 0.25


def test_noise_swaps_captions_within_an_update_and_more_of_it_holds_the_less() -> None:
    pairs = tuple(Pair(f"p{n}", f"a thing {n}", bytes, f"label {n}") for n in range(400))
    assert with_noise(pairs, 0.0, 0.0) == pairs

    def changed(swapped: float, hostile: float = 0.0) -> set[str]:
        made = with_noise(pairs, swapped, hostile)
        assert [pair.id for pair in made] == [pair.id for pair in pairs]
        if not hostile:
            assert sorted(pair.text for pair in made) == sorted(pair.text for pair in pairs)
        assert all(pair.text.split()[-1] == pair.label.split()[-1] for pair in made)
        return {new.id for new, old in zip(made, pairs, strict=True) if new.text != old.text}

    few, many = changed(0.1), changed(0.3)
    assert few < many and 20 < len(few) < 60 and 90 < len(many) < 150
    lies = [pair for pair in with_noise(pairs, 0.0, 0.2) if pair.text == pairs[0].text]
    assert 50 < len(lies) < 110 and len(changed(0.3, 0.2)) > len(many)


def test_a_trial_is_scored_by_what_its_updates_teach(tmp_path: Path) -> None:
    """Before, suites of updates that it had not reached hid what it learned, and the best trial learned nothing."""
    roles = {"boat": "adaptation", "car": "adaptation", "house": "held-out"}
    unit = Unit("lora", ORDER, trial=(0, 0))
    before = {name: ["0101"] for name in roles}
    zero_shot = {"roles": roles, "hits": before, NEAREST: {}}
    (tmp_path / "zero-shot.json").write_text(json.dumps(zero_shot))
    unit.folder(tmp_path).mkdir(parents=True)
    for number in range(1, UPDATES + 1):
        row = {"chain": chain_name(unit.recipe, unit), "update": "car", "hits": before | {"car": ["1111"]}, "cost": {}}
        update_path(unit.folder(tmp_path), number).write_text(json.dumps(row))
    runner: Any = SimpleNamespace(results=tmp_path)
    trial = run_tuning._trial(runner, "lora", (0, 0))
    assert trial is not None and (trial.gm, trial.a_zs) == (round(100 * 0.5**0.5, 2), 0.0)
