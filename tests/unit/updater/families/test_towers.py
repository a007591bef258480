from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from serving.engines.clip_base import ClipBase, tower_of
from serving.engines.lora import effective_weights
from tests.unit.updater.builders import recipe, run
from updater.adapters.trained_layers import Which, clip_layers, first_touched, tower_blocks
from updater.families.clip_towers import SplitTower, stack_boundaries


@pytest.mark.parametrize("which", ["image", "text"])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_boundary_gives_the_same_features(base: ClipBase, which: Which, cut: int) -> None:
    tower = SplitTower(base.build_model(), which, cut)
    inputs = torch.randn(5, 3, 32, 32) if which == "image" else base.tokenizer()(["a", "b c", "d", "e f g", "h"])
    with torch.no_grad():
        features, boundary = tower.record(inputs)
        order = [3, 0, 4]
        rest = inputs[order] if which == "text" else torch.zeros(1, 3, 32, 32)
        again = tower.resume(stack_boundaries([boundary[i] for i in order], None, torch.device("cpu")), rest)
        assert torch.allclose(again, features[order], atol=1e-6)
        assert torch.allclose(tower.whole(inputs), features, atol=1e-6)


def test_only_the_last_blocks_and_what_follows_learn(base: ClipBase) -> None:
    model = base.build_model()
    assert tower_blocks(model, "image") == ("visual.transformer.resblocks", 2)
    assert tower_blocks(model, "text") == ("transformer.resblocks", 2)
    names = clip_layers(base, model, recipe(image={"blocks": 1}, text={"locked": True}))
    assert names and all(name.startswith("visual.transformer.resblocks.1.") for name in names)
    assert first_touched(names, model, "image") == 1
    assert first_touched(names, model, "text") == 2  # nothing learns there: all of it is prefix
    everything = clip_layers(base, model, recipe(image={}, text={}))
    assert first_touched(everything, model, "image") == first_touched(everything, model, "text") == 0
    with pytest.raises(ConfigError, match="no layer"):
        clip_layers(base, model, recipe(image={"blocks": 0}, text={"locked": True}))


def test_boundaries_of_texts_are_cut_or_padded_to_the_batch() -> None:
    out = stack_boundaries([torch.ones(3, 2), torch.full((5, 2), 2.0)], 4, torch.device("cpu"))
    assert out.shape == (2, 4, 2)
    assert out[:, 3].tolist() == [[0, 0], [2, 2]]


def test_the_slow_tower_moves_less_and_the_other_one_as_before(base: ClipBase, tmp_path: Path) -> None:
    start = base.build_model().state_dict()

    def moved(rate: float) -> dict[str, float]:
        folder = tmp_path / str(rate)
        made = run(base, folder, recipe=recipe("slow-tower", max_steps=3, image={"blocks": 3, "rate": rate}))
        squared = {"image": 0.0, "text": 0.0}
        for name, weight in effective_weights(made.directory, base.build_model()).items():
            squared[tower_of(name)] += float((weight - start[name]).square().sum())
        return {tower: value**0.5 for tower, value in squared.items()}

    slow, even = moved(recipe("slow-tower").image.rate), moved(1.0)
    assert 0 < slow["image"] < 0.2 * even["image"]
    assert 0.8 * even["text"] < slow["text"] < 1.25 * even["text"]
