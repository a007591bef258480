from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serving.engines.vlm.vlm_base import VlmBase
from tests.support.vlm_families import write_family
from tests.unit.updater.builders import learner_of, png, recipe, run
from updater.bases.register import add_vlm
from updater.data.pools import Pools, Question

TILED = {
    "SmolVLM": {"do_image_splitting": True, "size": {"longest_edge": 64}},
    "InternVL": {"crop_to_patches": True, "min_patches": 1, "max_patches": 4},
}
SIZES = [(32, 32), (64, 32), (32, 64), (64, 48), (96, 32), (9, 200)]


@pytest.fixture(scope="module", params=sorted(TILED))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    home = tmp_path_factory.mktemp(request.param)
    write_family(request.param, home / "model")
    changed = 0
    for file in (home / "model").glob("*processor*.json"):
        values = json.loads(file.read_text())
        changed += _cut_into_tiles(values, TILED[request.param])
        file.write_text(json.dumps(values))
    assert changed
    return add_vlm(home, "tiled", home / "model")


def _cut_into_tiles(values: dict[str, Any], tiled: dict[str, Any]) -> int:
    found = int(next(iter(tiled)) in values)
    if found:
        values.update(tiled)
    return found + sum(_cut_into_tiles(each, tiled) for each in values.values() if isinstance(each, dict))


def asked(sizes: list[tuple[int, int]]) -> tuple[Question, ...]:
    def noise(number: int, width: int, height: int) -> bytes:
        return png(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))

    return tuple(
        Question(f"{number}", "which colour?", "red", partial(noise, number, *size))
        for number, size in enumerate(sizes)
    )


def test_features_of_tiles_that_are_kept_and_pixels_that_are_not_give_the_same(base: VlmBase) -> None:
    pools = Pools(asked(SIZES))
    kept, anew = learner_of(base, pools), learner_of(base, pools, image={"locked": False})
    assert kept.keeps_features and not anew.keeps_features
    rows = [1, 0, 3, 5]
    assert torch.allclose(kept.batch(rows).logits, anew.batch(rows).logits, atol=1e-4)


@pytest.mark.parametrize("sizes", [SIZES * 2, [(64, 32)] * 12], ids=["many shapes", "one shape"])
def test_an_update_ends_whatever_the_shapes_of_its_pictures(
    base: VlmBase, tmp_path: Path, sizes: list[tuple[int, int]]
) -> None:
    result = run(base, tmp_path, recipe=recipe("vlm-naive", max_steps=3, batch_size=4), pools=Pools(asked(sizes)))
    assert (result.steps, result.visited) == (3, 12)
