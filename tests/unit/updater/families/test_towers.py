"""Starting a tower at its boundary changes nothing but the time it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import recipe
from updater.adapters.trained_layers import clip_layers, first_touched, tower_blocks
from updater.families.clip_towers import SplitTower, stack_boundaries


@pytest.mark.parametrize("which", ["image", "text"])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_boundary_gives_the_same_features(tmp_path: Path, which: str, cut: int) -> None:
    base = tiny_base(tmp_path)
    tower = SplitTower(base.build_model(), which, cut)  # type: ignore[arg-type]
    inputs = torch.randn(5, 3, 32, 32) if which == "image" else base.tokenizer()(["a", "b c", "d", "e f g", "h"])
    with torch.no_grad():
        features, boundary = tower.record(inputs)
        order = [3, 0, 4]
        rest = inputs[order] if which == "text" else torch.zeros(1, 3, 32, 32)
        again = tower.resume(stack_boundaries([boundary[i] for i in order], None, torch.device("cpu")), rest)
        assert torch.allclose(again, features[order], atol=1e-6)
        assert torch.allclose(tower.whole(inputs), features, atol=1e-6)


def test_only_the_last_blocks_and_what_follows_learn(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    model = base.build_model()
    assert tower_blocks(model, "image") == ("visual.transformer.resblocks", 2)
    assert tower_blocks(model, "text") == ("transformer.resblocks", 2)
    names = clip_layers(base, model, recipe(image={"blocks": 1}, text={"locked": True}))
    assert names and all(name.startswith("visual.transformer.resblocks.1.") for name in names)
    assert first_touched(names, model, "image") == 1
    assert first_touched(names, model, "text") == 2  # nothing learns there: all of it is prefix
    everything = clip_layers(base, model, recipe(image={}, text={}))
    assert first_touched(everything, model, "image") == first_touched(everything, model, "text") == 0


def test_a_recipe_under_which_nothing_learns_is_refused(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    with pytest.raises(ConfigError, match="no layer"):
        clip_layers(base, base.build_model(), recipe(image={"blocks": 0}, text={"locked": True}))


def test_boundaries_of_texts_are_cut_or_padded_to_the_batch() -> None:
    rows = [torch.ones(3, 2), torch.full((5, 2), 2.0)]
    out = stack_boundaries(rows, 4, torch.device("cpu"))
    assert out.shape == (2, 4, 2)
    assert out[0, 3].tolist() == [0, 0]
    assert out[1, 3].tolist() == [2, 2]
