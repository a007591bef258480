"""A tower with a rate of its own."""

from __future__ import annotations

from pathlib import Path

from serving.engines.clip_base import tower_of
from serving.engines.lora import effective_weights
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import recipe, run


def test_the_slow_tower_moves_less_and_the_other_one_as_before(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    start = base.build_model().state_dict()

    def moved(rate: float) -> dict[str, float]:
        """Length of the change of each tower."""
        folder = tmp_path / str(rate)
        made = run(base, folder, recipe=recipe("slow-tower", image={"blocks": 3, "rate": rate}))
        squared = {"image": 0.0, "text": 0.0}
        for name, weight in effective_weights(made.directory, base.build_model()).items():
            squared[tower_of(name)] += float((weight - start[name]).square().sum())
        return {tower: value**0.5 for tower, value in squared.items()}

    slow, even = moved(recipe("slow-tower").image.rate), moved(1.0)
    assert 0 < slow["image"] < 0.2 * even["image"]
    assert 0.8 * even["text"] < slow["text"] < 1.25 * even["text"]
