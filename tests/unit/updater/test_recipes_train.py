"""Every shipped CLIP recipe trains on a tiny base, is served as it was trained, and goes on after it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from serving.engines.adapters import effective_weights
from serving.engines.base import ClipBase
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import picture, pools, recipe, run
from updater.adapters import trainer_encoder
from updater.recipes import load_recipe, recipe_names
from updater.train import Stopped

CLIP = [name for name in recipe_names() if load_recipe(name).family == "clip"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", CLIP)
def test_two_updates_in_a_row_are_served_as_trained_and_end_alike_when_stopped(
    base: ClipBase, tmp_path: Path, name: str
) -> None:
    plan = recipe(name, max_steps=4)
    first = run(base, tmp_path / "first", recipe=plan)
    again = {"recipe": plan, "pools": pools(replay=12), "incumbent": first.directory, "memory": first.memory, "seed": 5}
    second = run(base, tmp_path / "second", **again)
    assert first.adapter != second.adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
    engine = ClipEngine(base)
    engine.load(second.adapter, second.directory)
    pixels = np.stack([base.preprocess.pixels(picture(i)) for i in range(4)])
    images, texts = trainer_encoder(base, second.directory)(pixels, ["a red car", "a tree"])
    assert np.allclose(images, engine.encode_images(pixels, second.adapter), atol=1e-5)
    assert np.allclose(texts, engine.encode_texts(["a red car", "a tree"], second.adapter), atol=1e-5)
    with pytest.raises(Stopped):
        run(base, tmp_path / "stopped", **again, stop=_soon())
    assert run(base, tmp_path / "stopped", **again).adapter == second.adapter


@pytest.mark.parametrize("name", CLIP)
def test_what_a_recipe_locks_stays_bit_by_bit(base: ClipBase, tmp_path: Path, name: str) -> None:
    plan = recipe(name, max_steps=2)
    changed = effective_weights(run(base, tmp_path, recipe=plan).directory, base.build_model())
    assert any(name.startswith("visual.") for name in changed) != plan.image.locked
    assert any(not name.startswith("visual.") for name in changed) != plan.text.locked
    assert all(torch.isfinite(weight).all() for weight in changed.values())


def _soon() -> Callable[[], bool]:
    """True some steps after the preparation."""
    asked = count()
    return lambda: next(asked) >= 4
