"""The weight of a merge that is searched for: which one is taken, and that a killed search ends in the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from serving.engines.adapters import adapter_name
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.unit.updater.builders import recipe, run
from updater.methods.merging import search
from updater.recipes import Merge, Recipe
from updater.training.workers import Stopped

WEIGHTS = (0.2, 0.6, 1.0)


class Picky:
    """Likes the adapter that it is asked for as number ``wanted``; keeps how long each one's ΔW was."""

    passes = 7

    def __init__(self, base: ClipBase, wanted: int) -> None:
        self.model = base.build_model()
        self.wanted = wanted
        self.asked: list[float] = []

    def __call__(self, directory: Path) -> float:
        plain = dict(self.model.named_parameters())
        changed = effective_weights(directory, self.model)
        self.asked.append(float(torch.stack([(w - plain[n]).norm() for n, w in changed.items()]).norm()))
        return 1.0 if len(self.asked) == self.wanted else 0.5


def plan(**merge: object) -> Recipe:
    return recipe("paint", max_steps=2, merge={"rule": "linear", "weight": 0.5, **merge})


def test_each_weight_is_scored_once_and_the_best_one_is_served(base: ClipBase, tmp_path: Path) -> None:
    picky = Picky(base, wanted=2)
    found = run(base, tmp_path / "searched", recipe=plan(search=WEIGHTS), scored=picky)
    fixed = run(base, tmp_path / "fixed", recipe=plan(weight=0.6))
    assert found.adapter == fixed.adapter == adapter_name(found.directory)
    assert picky.asked == pytest.approx([w / 0.6 * picky.asked[1] for w in WEIGHTS], rel=1e-3)
    assert found.cost["merge_weight"] == 0.6
    assert found.cost["search_scores"] == {"0.2": 0.5, "0.6": 1.0, "1": 0.5}
    assert found.cost["search_gflops"] == pytest.approx(3 * 7 * found.cost["sample_gflops"])
    assert "search_gflops" not in fixed.cost
    assert [path.name for path in (tmp_path / "searched" / "adapters").iterdir()] == [found.adapter]


class Same:
    """Scores everything alike."""

    def __init__(self, passes: int) -> None:
        self.passes = passes

    def __call__(self, directory: Path) -> float:
        return 0.3


@pytest.mark.parametrize(("passes", "taken", "tried"), [(1, 0.4, [0.4, 0.2, 0.9]), (0, 0.7, [])])
def test_among_equals_the_first_one_is_taken_and_without_items_the_recipes(
    tmp_path: Path, passes: int, taken: float, tried: list[float]
) -> None:
    written: list[float] = []

    def write(merge: Merge, place: Path) -> str:
        written.append(merge.weight)
        return place.name

    found = search(Merge(weight=0.7, search=(0.4, 0.2, 0.9)), Same(passes), write, tmp_path)
    assert (found.merge.weight, written) == (taken, tried)


def test_a_search_that_is_stopped_begins_again_and_ends_in_the_same_adapter(base: ClipBase, tmp_path: Path) -> None:
    searching = plan(search=WEIGHTS)
    whole = run(base, tmp_path / "whole", recipe=searching, scored=Picky(base, wanted=3))
    stopped = Picky(base, wanted=3)
    with pytest.raises(Stopped):
        run(base, tmp_path / "two", recipe=searching, scored=stopped, stop=lambda: len(stopped.asked) == 2)
    assert not list((tmp_path / "two" / "adapters").iterdir())
    again = run(base, tmp_path / "two", recipe=searching, scored=Picky(base, wanted=3))
    assert (again.adapter, again.steps) == (whole.adapter, 2)


def test_a_recipe_that_searches_wants_something_to_score_with(base: ClipBase, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"merge\.search"):
        run(base, tmp_path, recipe=plan(search=WEIGHTS), scored=None)
    assert not (tmp_path / "adapters").exists()
