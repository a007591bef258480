"""Images that ingest was told to accept although they are larger than its default: they are learned from and judged."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ratchet_client.records import DEFAULT_LIMITS
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import pairs, picture, questions, recipe, run
from updater.data.pools import Pair, Pools, Question
from updater.gate.suite_items import Item, open_picture


def large(size: int = DEFAULT_LIMITS.max_image_bytes + 1) -> bytes:
    """A picture of so many bytes: what follows its end is nothing to any decoder."""
    return picture(1).ljust(size, b"\0")


@pytest.mark.parametrize("views", [1, 2])
def test_a_clip_learns_from_an_image_above_the_default_limit(tmp_path: Path, views: int) -> None:
    pool = Pools((Pair("large", "a large picture", large), *pairs("car", 2)))
    plan = recipe("naive", max_steps=1, batch_size=3, views={"count": views})
    assert run(tiny_base(tmp_path), tmp_path, recipe=plan, pools=pool).visited == 3


def test_a_vlm_learns_from_an_image_above_the_default_limit(tmp_path: Path) -> None:
    pool = Pools((Question("large", "which colour?", "red", large), *questions("car", 2)))
    plan = recipe("vlm-naive", max_steps=1, batch_size=3)
    assert run(tiny_vlm_base(tmp_path), tmp_path, recipe=plan, pools=pool).visited == 3


def test_the_gate_reads_an_image_of_any_size() -> None:
    item = Item("id", "a large picture", "key", "large", "sample/1", partial(large, (32 << 20) + 1))
    assert np.asarray(open_picture(item)).shape == (24, 28, 3)
