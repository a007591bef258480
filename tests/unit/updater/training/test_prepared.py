from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.errors import ConfigError, TrainingError
from ratchet_client.records import DEFAULT_LIMITS
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.vlm_families import write_family
from tests.unit.updater.builders import LIMITS, pairs, picture, png, questions, recipe, resumed, run
from updater.adapters import read_delta
from updater.bases.register import add_vlm
from updater.data.pools import Pools
from updater.families.clip_learner import ClipLearner
from updater.gate.suite_items import Item, open_picture
from updater.step.learner import Precomputed
from updater.training.measure import SMALL
from updater.training.result import NAMED, TrainResult, cost_of

LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


class Reads:
    """Pools that count reads of their images."""

    def __init__(self, new: int, reference: int) -> None:
        self.counts: Counter[str] = Counter()
        self.pools = Pools(*(
            tuple(replace(pair, read=partial(self.read, pair.id, pair.read)) for pair in pairs(tag, count))
            for tag, count in (("car", new), ("house", reference))
        ))  # fmt: skip

    def read(self, name: str, read: Any) -> bytes:
        self.counts[name] += 1
        return bytes(read())


def test_only_rows_that_steps_visit_are_read_and_once(base: ClipBase, tmp_path: Path) -> None:
    """Three steps of 3 new rows of 300, and of 6 reference rows, the same ones each time. Four are measured as full
    fine-tuning, two of them twice, and the rows of one step were read in advance when the first was measured.
    """
    reads = Reads(300, 6)
    result = run(base, tmp_path, pools=reads.pools, recipe=recipe(max_steps=3))
    assert set(reads.counts) == {f"car-{i}" for i in range(9)} | {f"house-{i}" for i in range(6)}
    assert reads.counts.total() <= 15 + 6 + 9
    assert (result.pending, result.visited) == (300, 9)
    assert result.samples == {"new": 9, "reference": 6, "replay": 0}


def test_a_resumed_update_prepares_no_finished_shard_again_and_is_charged_the_same(
    base: ClipBase, tmp_path: Path
) -> None:
    """Stopped after each shard and each step in turn, with a teacher that is the model at its start."""
    start = run(base, tmp_path / "before", recipe=recipe("naive", max_steps=2, **LAST)).directory
    given = {"recipe": recipe("lwf", max_steps=3, **LAST), "incumbent": start}
    whole = run(base, tmp_path / "whole", pools=Reads(60, 60).pools, **given)
    reads, attempts = Reads(60, 60), []

    def attempt(**options: Any) -> TrainResult:
        attempts.append(options)
        return run(base, tmp_path / "parts", pools=reads.pools, **given, **options)

    parts = resumed(attempt, 2, least=3)
    assert (parts.adapter, parts.losses, parts.maf) == (whole.adapter, whole.losses, whole.maf)
    measured = {f"car-{i}" for i in range(2 * SMALL)}
    # A shard that was read in advance when the update was stopped is read again, and is not computed twice.
    assert all(count <= 1 + len(attempts) for name, count in reads.counts.items() if name not in measured)


def test_the_incumbent_teaches_what_it_said_at_the_start_at_any_time(base: ClipBase, tmp_path: Path) -> None:
    """Even though its teaching starts at a boundary; that this gives the same: families/test_towers.py."""
    first, later = run(base, tmp_path, recipe=recipe("naive", max_steps=2, **LAST)), range(6, 12)
    start = read_delta(first.directory, base)
    moved, fresh = (ClipLearner(base, recipe("lwf", **LAST), start, seed=0) for _ in range(2))
    for learner in (moved, fresh):
        assert all(tower.cut > 0 for tower in learner.towers.values())
        learner.prepare(pairs("car", 12), ["new"] * 12, Precomputed(tmp_path / str(id(learner)), rows={"new": 6}))
    moved.forward_backward(range(6))
    moved.optimizer_step(0.5)
    for learner in (moved, fresh):
        learner.ready(later)
    for name in ("image.incumbent", "text.incumbent", "image.boundary"):
        assert torch.equal(*(torch.stack(learner.shards.get(name, later)) for learner in (moved, fresh)))
    assert not torch.equal(moved.features("image", later), fresh.features("image", later))


def test_boundaries_without_room_on_disk_are_computed_anew_and_give_the_same(base: ClipBase, tmp_path: Path) -> None:
    kept, anew = (ClipLearner(base, recipe(**LAST), {}, seed=0) for _ in range(2))
    kept.prepare(pairs("car", 6), ["new"] * 6, Precomputed(tmp_path / "kept"))
    anew.prepare(pairs("car", 6), ["new"] * 6, Precomputed(tmp_path / "anew", room=100))
    one, other = kept.batch(range(6)), anew.batch(range(6))
    assert torch.allclose(one.image, other.image, atol=1e-5) and torch.allclose(one.text, other.text, atol=1e-5)
    assert anew.row_bytes() < kept.row_bytes() / 2


def test_the_disk_of_the_work_folder_bounds_the_steps(base: ClipBase, tmp_path: Path) -> None:
    given = {"recipe": recipe(max_steps=5, image={}, text={}), "pools": Reads(60, 60).pools}  # pixels are kept
    free = run(base, tmp_path / "free", **given)
    room = 20 * free.cost["row_bytes"]
    bound = run(base, tmp_path / "bound", limits=replace(LIMITS, work_bytes=room), **given)
    assert (free.steps, bound.steps) == (5, 2)
    assert sum(file.stat().st_size for file in (tmp_path / "bound" / "work" / "prepared").iterdir()) <= room
    with pytest.raises(ConfigError, match=r"updater\.work_gib does not hold what one step"):
        run(base, tmp_path / "none", pools=Reads(60, 60).pools, limits=replace(LIMITS, work_bytes=1000))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    folder = tmp_path_factory.mktemp("qwen")
    write_family("Qwen2-VL", folder / "model")
    return add_vlm(folder / "home", "tried", folder / "model")


def broken() -> bytes:
    """Bytes that are not a picture."""
    return b"\x89PNG\r\n\x1a\n and nothing more"


def narrow() -> bytes:
    """A picture of 8 x 2,000 pixels."""
    return png(np.zeros((2000, 8, 3), np.uint8))


def spoiled(rows: Container[int]) -> Pools:
    return Pools(tuple(replace(each, read=broken) if n in rows else each for n, each in enumerate(pairs("car", 16))))


LEARNED = recipe("naive", max_steps=4, batch_size=4)


def test_damaged_pictures_are_left_out_and_named_also_by_an_update_that_is_stopped(
    base: ClipBase, tmp_path: Path
) -> None:
    result = run(base, tmp_path / "whole", recipe=LEARNED, pools=spoiled((1, 6)))
    assert set(result.left_out) == {"car-1", "car-6"} and result.steps == 4
    assert "header" in result.left_out["car-1"]
    cost = cost_of(result)
    assert cost["left_out"] == 2 and list(cost["left_out_samples"]) == ["car-1", "car-6"] and NAMED >= 2
    parts = resumed(partial(run, base, tmp_path, recipe=LEARNED, pools=spoiled((1, 6))), 3)
    assert (parts.adapter, parts.left_out, parts.maf) == (result.adapter, result.left_out, result.maf)
    assert result.adapter != run(base, tmp_path / "good", recipe=LEARNED, pools=spoiled(())).adapter


def test_a_batch_of_which_nothing_can_be_prepared_is_passed_over_and_an_update_fails(
    base: ClipBase, tmp_path: Path
) -> None:
    half = run(base, tmp_path / "half", recipe=LEARNED, pools=spoiled(range(8)))
    assert (half.steps, len(half.losses["loss"]), len(half.left_out)) == (4, 2, 8)
    with pytest.raises(TrainingError, match=r"of 16 samples none can be prepared; car-0: .*header"):
        run(base, tmp_path / "none", recipe=LEARNED, pools=spoiled(range(16)))


@pytest.mark.parametrize("first", [0, 5])
def test_a_picture_that_a_processor_refuses_is_left_out(qwen: VlmBase, tmp_path: Path, first: int) -> None:
    """Even if it is the very first one."""
    good = questions("car", 12)
    bad = tuple(replace(each, read=narrow) if number == first else each for number, each in enumerate(good))
    result = run(qwen, tmp_path, recipe=recipe("vlm-naive", max_steps=3, batch_size=4), pools=Pools(bad))
    assert "aspect ratio" in result.left_out.pop(f"car-{first}")
    assert not result.left_out and result.steps == 3


def large(size: int = DEFAULT_LIMITS.max_image_bytes + 1) -> bytes:
    """A picture of this many bytes: decoders ignore what follows its end."""
    return picture(1).ljust(size, b"\0")


@pytest.mark.parametrize(("name", "views"), [("naive", {}), ("naive", {"count": 2}), ("vlm-naive", {})])
def test_an_image_above_the_default_limit_is_learned_from(
    base: ClipBase, vlm: VlmBase, tmp_path: Path, name: str, views: dict[str, int]
) -> None:
    rows: Any = (questions if name == "vlm-naive" else pairs)("car", 3)
    plan = recipe(name, max_steps=1, batch_size=3, **({"views": views} if views else {}))
    pool = Pools((replace(rows[0], read=large), *rows[1:]))
    assert run(vlm if name == "vlm-naive" else base, tmp_path, recipe=plan, pools=pool).visited == 3


def test_the_gate_reads_an_image_of_any_size() -> None:
    item = Item("id", "a large picture", "key", "large", "sample/1", partial(large, (32 << 20) + 1))
    assert np.asarray(open_picture(item)).shape == (24, 28, 3)
