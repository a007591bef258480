"""Samples that cannot be prepared: an update goes on without them, and names them."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import TrainingError
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.vlm_families import write_family
from tests.unit.updater.builders import pairs, questions, recipe, resumed, run
from updater.bases.register import add_vlm
from updater.data.pools import Pools
from updater.training.result import NAMED, cost_of


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    folder = tmp_path_factory.mktemp("qwen")
    write_family("Qwen2-VL", folder / "model")
    return add_vlm(folder / "home", "tried", folder / "model")


def broken() -> bytes:
    """Bytes of no picture."""
    return b"\x89PNG\r\n\x1a\n and nothing more"


def narrow() -> bytes:
    """A picture of 8 x 2,000 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((2000, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


LEARNED = recipe("naive", max_steps=4, batch_size=4)


def test_damaged_pictures_are_left_out_and_named(base: ClipBase, tmp_path: Path) -> None:
    good = pairs("car", 16)
    bad = tuple(replace(each, read=broken) if number in (1, 6) else each for number, each in enumerate(good))
    result = run(base, tmp_path, recipe=LEARNED, pools=Pools(bad))
    assert set(result.left_out) == {"car-1", "car-6"}
    assert "header" in result.left_out["car-1"]
    assert result.steps == 4
    cost = cost_of(result)
    assert cost["left_out"] == 2 and list(cost["left_out_samples"]) == ["car-1", "car-6"] and NAMED >= 2
    assert result.adapter != run(base, tmp_path / "good", recipe=LEARNED, pools=Pools(good)).adapter


def test_an_update_that_is_stopped_leaves_out_the_same(base: ClipBase, tmp_path: Path) -> None:
    bad = tuple(replace(each, read=broken) if n in (1, 6) else each for n, each in enumerate(pairs("car", 16)))
    whole = run(base, tmp_path / "whole", recipe=LEARNED, pools=Pools(bad))
    parts = resumed(partial(run, base, tmp_path, recipe=LEARNED, pools=Pools(bad)), 3)
    assert (parts.adapter, parts.left_out, parts.maf) == (whole.adapter, whole.left_out, whole.maf)


def test_a_batch_of_which_nothing_can_be_prepared_is_passed_over(base: ClipBase, tmp_path: Path) -> None:
    bad = tuple(replace(each, read=broken) if n < 8 else each for n, each in enumerate(pairs("car", 16)))
    result = run(base, tmp_path, recipe=LEARNED, pools=Pools(bad))
    assert (result.steps, len(result.losses["loss"]), len(result.left_out)) == (4, 2, 8)


def test_an_update_of_which_nothing_can_be_prepared_fails_with_the_reason(base: ClipBase, tmp_path: Path) -> None:
    bad = tuple(replace(each, read=broken) for each in pairs("car", 16))
    with pytest.raises(TrainingError, match=r"of 16 samples none can be prepared; car-0: .*header"):
        run(base, tmp_path, recipe=LEARNED, pools=Pools(bad))


@pytest.mark.parametrize("first", [0, 5])
def test_a_picture_that_a_processor_refuses_is_left_out(qwen: VlmBase, tmp_path: Path, first: int) -> None:
    """Also where it is the first one of all."""
    good = questions("car", 12)
    bad = tuple(replace(each, read=narrow) if number == first else each for number, each in enumerate(good))
    result = run(qwen, tmp_path, recipe=recipe("vlm-naive", max_steps=3, batch_size=4), pools=Pools(bad))
    assert "aspect ratio" in result.left_out.pop(f"car-{first}")
    assert not result.left_out and result.steps == 3
