"""What an update prepares of many pending samples: the rows that its steps visit, once, on disk, and no others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import LIMITS, pairs, recipe, run
from updater.adapters import read_delta
from updater.data.pools import Pair, Pools
from updater.families.clip_learner import ClipLearner
from updater.step.learner import Precomputed
from updater.training.measure import SMALL
from updater.training.workers import Stopped

LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


class Reads:
    """Pools whose images are counted as they are read."""

    def __init__(self, new: int, reference: int) -> None:
        self.counts: Counter[str] = Counter()
        self.pools = Pools(self.watched("car", new), self.watched("house", reference))

    def watched(self, tag: str, count: int) -> tuple[Pair, ...]:
        def reading(pair: Pair) -> Pair:
            def read() -> bytes:
                self.counts[pair.id] += 1
                return pair.read()

            return Pair(pair.id, pair.text, read)

        return tuple(map(reading, pairs(tag, count)))


def test_only_rows_that_steps_visit_are_read(base: ClipBase, tmp_path: Path) -> None:
    """Two steps of 3 new and 6 reference rows, of 300 and 200; the measured sample is read again."""
    reads = Reads(300, 200)
    result = run(base, tmp_path, pools=reads.pools, recipe=recipe(max_steps=2))
    assert set(reads.counts) == {f"car-{i}" for i in range(6)} | {f"house-{i}" for i in range(12)}
    assert (result.pending, result.visited) == (300, 6)
    assert result.samples == {"new": 6, "reference": 12, "replay": 0}


def test_a_resumed_update_prepares_no_finished_shard_again_and_is_charged_the_same(
    base: ClipBase, tmp_path: Path
) -> None:
    """Stopped after each shard and each step in turn, with a teacher that is the model at its start."""
    start = run(base, tmp_path / "before", recipe=recipe("naive", max_steps=2, **LAST)).directory
    plan = recipe("lwf", max_steps=3, **LAST)
    whole = run(base, tmp_path / "whole", recipe=plan, incumbent=start, pools=Reads(60, 60).pools)
    reads, stops = Reads(60, 60), 0
    for _ in range(20):
        asked = iter([False, True])
        try:
            parts = run(
                base, tmp_path / "parts", recipe=plan, incumbent=start, pools=reads.pools,
                stop=lambda asked=asked: next(asked),
            )  # fmt: skip
            break
        except Stopped:
            stops += 1
    assert stops >= 3
    assert (parts.adapter, parts.losses, parts.maf) == (whole.adapter, whole.losses, whole.maf)
    measured = {f"car-{i}" for i in range(2 * SMALL)}
    # A shard that was read in advance when the update was stopped is read again, and is not computed twice.
    assert all(count <= 2 + stops for name, count in reads.counts.items() if name not in measured)


def test_the_incumbent_teaches_what_it_was_at_the_start_whenever_it_is_asked(base: ClipBase, tmp_path: Path) -> None:
    first = run(base, tmp_path, recipe=recipe("naive", max_steps=2, **LAST))
    start = read_delta(first.directory, base)
    moved, fresh = (ClipLearner(base, recipe("lwf", **LAST), start, seed=0) for _ in range(2))
    for learner in (moved, fresh):
        learner.prepare(pairs("car", 12), ["new"] * 12, Precomputed(tmp_path / str(id(learner)), rows={"new": 6}))
    moved.forward_backward(range(6))
    moved.optimizer_step(0.5)
    later = range(6, 12)
    for name in ("image.incumbent", "text.incumbent", "image.boundary"):
        moved.ready(later)
        fresh.ready(later)
        assert torch.equal(torch.stack(moved.shards.get(name, later)), torch.stack(fresh.shards.get(name, later)))
    assert not torch.equal(moved.features("image", later), fresh.features("image", later))


def test_boundaries_without_room_on_disk_are_computed_anew_and_give_the_same(base: ClipBase, tmp_path: Path) -> None:
    kept, anew = (ClipLearner(base, recipe(**LAST), {}, seed=0) for _ in range(2))
    kept.prepare(pairs("car", 6), ["new"] * 6, Precomputed(tmp_path / "kept"))
    anew.prepare(pairs("car", 6), ["new"] * 6, Precomputed(tmp_path / "anew", room=100))
    one, other = kept.batch(range(6)), anew.batch(range(6))
    assert torch.allclose(one.image, other.image, atol=1e-5)
    assert torch.allclose(one.text, other.text, atol=1e-5)
    assert anew.row_bytes() < kept.row_bytes() / 2


def test_the_disk_of_the_work_folder_bounds_the_steps(base: ClipBase, tmp_path: Path) -> None:
    plan = recipe(max_steps=5, image={}, text={})  # no boundaries: pixels are kept
    free = run(base, tmp_path / "free", pools=Reads(60, 60).pools, recipe=plan)
    room = 20 * free.cost["row_bytes"]
    bound = run(
        base, tmp_path / "bound", pools=Reads(60, 60).pools, recipe=plan, limits=replace(LIMITS, work_bytes=room)
    )
    assert (free.steps, bound.steps) == (5, 2)
    assert sum(file.stat().st_size for file in (tmp_path / "bound" / "work" / "prepared").iterdir()) <= room
    with pytest.raises(ConfigError, match=r"updater\.work_gib does not hold what one step"):
        run(base, tmp_path / "none", pools=Reads(60, 60).pools, limits=replace(LIMITS, work_bytes=1000))
