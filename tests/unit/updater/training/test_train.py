from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from core.errors import BudgetError, ConfigError, DiskFull, TrainingError
from ratchet_client.records import DEFAULT_LIMITS
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.vlm_families import write_family
from tests.unit.updater.builders import (
    LIMITS,
    pairs,
    picture,
    png,
    pools,
    question_pools,
    questions,
    recipe,
    resumed,
    run,
)
from updater.adapters import Dense, LowRank, read_delta
from updater.adapters.weight_deltas import kept_share
from updater.bases.register import add_vlm
from updater.data.pools import Pair, Pools, Question
from updater.families.clip_learner import ClipLearner
from updater.gate.suite_items import Item, open_picture
from updater.recipes import Recipe
from updater.step.learner import AnyLearner, Base, Learner, Precomputed
from updater.training import checkpoint, trainer
from updater.training.checkpoint import CARRY_OVER, CarryOver, load_checkpoint
from updater.training.measure import SMALL
from updater.training.result import NAMED, TrainResult, cost_of


@pytest.fixture(scope="module", params=["base", "vlm"])
def either(request: pytest.FixtureRequest) -> Base:
    """A CLIP, and a VLM."""
    made: Base = request.getfixturevalue(request.param)
    return made


def plan_of(base: Base, **changes: Any) -> Recipe:
    return recipe("vlm-default" if base.family == "vlm" else "default", **changes)


def data_of(base: Base, **sizes: int) -> Pools:
    return (question_pools if base.family == "vlm" else pools)(**sizes)


@pytest.fixture(scope="module")
def first(either: Base, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(either, tmp_path_factory.mktemp("first"))


@pytest.mark.usefixtures("measured_once")
def test_the_same_inputs_give_the_same_adapter_others_another(either: Base, first: TrainResult, tmp_path: Path) -> None:
    assert run(either, tmp_path / "two").adapter == first.adapter
    assert run(either, tmp_path / "seed", seed=4).adapter != first.adapter
    assert run(either, tmp_path / "data", pools=data_of(either, new=14)).adapter != first.adapter


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("image", [{"blocks": 1}, pytest.param({"locked": False}, marks=pytest.mark.long)])
def test_a_stopped_update_ends_the_same(
    either: Base, first: TrainResult, tmp_path: Path, image: dict[str, Any]
) -> None:
    """Stopped after each single step in turn, with an incumbent that teaches: attention weights must not drift."""
    plan = plan_of(either, image=image, max_steps=4)
    again = {"recipe": plan, "incumbent": first.directory, "pools": data_of(either, replay=12)}
    whole = run(either, tmp_path / "whole", **again)
    parts = resumed(partial(run, either, tmp_path / "parts", **again), 4, least=2)  # after three shards
    assert (parts.adapter, parts.losses) == (whole.adapter, whole.losses)


@pytest.mark.usefixtures("measured_once")
def test_an_update_goes_on_from_the_incumbent(either: Base, first: TrainResult, tmp_path: Path) -> None:
    """With almost no learning the candidate equals the incumbent."""
    still = {"peak": 1e-9, "constant": 1e-9, "final": 1e-9}
    second = run(either, tmp_path / "second", incumbent=first.directory, recipe=plan_of(either, schedule=still))
    model = either.build_model()
    before, after = (effective_weights(r.directory, model) for r in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], weight, atol=1e-6) for name, weight in before.items())


def test_the_budget_decides_the_number_of_steps(either: Base, first: TrainResult, tmp_path: Path) -> None:
    """Two steps and the rows that they visit; no other is prepared."""
    one, two = (run(either, tmp_path / f"{n}", recipe=plan_of(either, max_steps=n)) for n in (1, 2))
    assert one.maf < two.maf < first.maf
    per_step = first.cost["maf_per_step"]
    enough_for_two = two.maf + 0.1 * per_step
    bound = run(either, tmp_path / "bound", limits=replace(LIMITS, gflops=enough_for_two))
    assert (bound.steps, bound.planned_steps) == (2, 2)
    assert bound.maf <= enough_for_two
    assert bound.samples == {"new": 6, "reference": 12, "replay": 0}
    with pytest.raises(BudgetError, match="does not pay for one step with its own rows"):
        run(either, tmp_path / "poor", limits=replace(LIMITS, gflops=one.maf - 0.5 * per_step))


@pytest.mark.usefixtures("measured_once")
def test_training_lowers_the_loss(either: Base, tmp_path: Path) -> None:
    fast = {"kind": "infinite", "peak": 0.02, "constant": 0.02, "final": 0.02, "warmup_steps": 1, "cooldown_steps": 1}
    naive, term = ("vlm-naive", "answer_likelihood") if either.family == "vlm" else ("naive", "contrastive")
    result = run(either, tmp_path, recipe=recipe(naive, max_steps=12, batch_size=12, schedule=fast))
    losses = result.losses[term]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    assert result.directory.name == result.adapter


@pytest.mark.usefixtures("measured_once")
def test_a_full_disk_or_bad_checkpoint_is_safe(base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(base, tmp_path / "undisturbed").adapter
    run(base, tmp_path, seed=4)
    assert load_checkpoint(tmp_path / "work", "another run") is None
    assert run(base, tmp_path).adapter == expected
    file = tmp_path / "work" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert run(base, tmp_path).adapter == expected
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)"))
    with monkeypatch.context() as small, pytest.raises(DiskFull, match="No space left"):
        small.setattr(checkpoint, "save_file", full)
        run(base, tmp_path / "full")
    assert run(base, tmp_path / "full").adapter == expected


def test_what_is_kept_of_a_higher_rank_is_said(
    base: ClipBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = run(base, tmp_path / "first", recipe=recipe(rank=8, max_steps=2))
    same = run(base, tmp_path / "same", incumbent=first.directory, recipe=recipe(rank=8, max_steps=1))
    assert same.cost["incumbent_kept"] == 1
    assert "the incumbent's rank" not in caplog.text
    lower = run(base, tmp_path / "lower", incumbent=first.directory, recipe=recipe(rank=2, max_steps=1))
    kept = kept_share(read_delta(first.directory, base), 2)
    assert lower.cost["incumbent_kept"] == kept < 1
    assert f"holds {100 * kept:.1f}% of what it learned" in caplog.text


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("which", ["image", "text"])
def test_a_locked_tower_keeps_the_space_of_the_incumbent(base: ClipBase, tmp_path: Path, which: str) -> None:
    first, engine = run(base, tmp_path / "first"), ClipEngine(base)
    made = run(base, tmp_path / "next", recipe=recipe(f"locked-{which}", max_steps=2), incumbent=first.directory)
    before, now = (engine.load(each.adapter, each.directory) for each in (first, made))
    assert getattr(now, which) == getattr(before, which) != getattr(base.spaces, which) and now != before


def test_the_wall_clock_bound_is_recorded(base: ClipBase, tmp_path: Path) -> None:
    result = run(base, tmp_path, limits=replace(LIMITS, seconds=1e-6))
    assert (result.truncated, result.steps, result.planned_steps) == (True, 1, 5)


def nan_loss(
    learner: AnyLearner, rows: list[int], real: Callable[..., Any] = Learner.forward_backward
) -> tuple[float, dict[str, float]]:
    return float("nan"), real(learner, rows)[1]


def poison(learner: AnyLearner, rate: float, step: int, steps: int) -> None:
    with torch.no_grad():
        next(iter(learner.parameters.values())).fill_(float("inf"))


@pytest.mark.parametrize(
    ("method", "broken", "message"),
    [("forward_backward", nan_loss, "step 0 is nan"), ("optimizer_step", poison, "after step 1 .* not finite")],
)
def test_a_loss_or_a_parameter_that_is_not_finite_stops_the_update_and_writes_nothing(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, broken: Any, message: str
) -> None:
    monkeypatch.setattr(Learner, method, broken)
    with pytest.raises(TrainingError, match=message):
        run(base, tmp_path, recipe=recipe(max_steps=1))
    assert not list(tmp_path.glob("adapters/clip-*"))


def test_what_cannot_be_asked_is_left_out_or_an_error(base: ClipBase, vlm: VlmBase, tmp_path: Path) -> None:
    good = question_pools(new=20)
    bad = Question("bad", "where is <image>?", "there", good.new[0].read)
    with_bad = run(vlm, tmp_path / "bad", pools=Pools((bad, *good.new), good.reference))
    assert (with_bad.samples["new"], with_bad.pending, with_bad.visited) == (15, 21, 15)
    assert with_bad.adapter == run(vlm, tmp_path / "good", pools=good).adapter
    with pytest.raises(TrainingError, match="no new sample"):
        run(vlm, tmp_path / "none", pools=Pools((bad,), good.reference))
    with pytest.raises(ConfigError, match="'default' trains a CLIP"):
        run(vlm, tmp_path, recipe=recipe(), pools=pools())
    with pytest.raises(ConfigError, match="'vlm-default' trains a VLM"):
        run(base, tmp_path, recipe=recipe("vlm-default"), pools=good)


@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("vlm-default", "text", marks=pytest.mark.long),
        ("vlm-logit-swap", "text"),
        ("vlm-orthogonal", "text"),
        pytest.param("vlm-sdft", "text", marks=pytest.mark.long),
        ("vlm-connector", "connector"),
    ],
)
def test_a_recipe_of_a_vlm_trains_two_updates_of_its_part(vlm: VlmBase, tmp_path: Path, name: str, part: str) -> None:
    given: dict[str, Any] = {"recipe": recipe(name, max_steps=2)}
    first = run(vlm, tmp_path / "first", **given)
    changed = effective_weights(first.directory, vlm.build_model())
    assert changed and {vlm.part_of(each.removesuffix(".weight")) for each in changed} == {part}
    given |= {"incumbent": first.directory, "carry_over": first.carry_over, "seed": 5}
    second = run(vlm, tmp_path / "second", **given)
    assert second.adapter.startswith("vlm-") and second.adapter != first.adapter
    assert second.adapter == run(vlm, tmp_path / "anew", **given).adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())


# What an update leaves to the next one


def test_a_memory_survives_its_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    start = {
        "visual.a.b": LowRank(torch.rand(2, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)),
        "text.ln.weight": Dense(torch.rand(5, dtype=torch.float64)),
    }
    kept = CarryOver(start, {"objective.x/y": torch.arange(3)}, updates=7)
    assert kept.write(tmp_path / "kept") == tmp_path / "kept"
    found = CarryOver.read(tmp_path / "kept")
    assert found.digest == kept.digest != replace(kept, updates=8).digest
    assert (found.updates, set(found.start), set(found.terms)) == (7, set(start), {"objective.x/y"})
    for name, part in start.items():
        pairs = zip(part.tensors(), found.start[name].tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert CarryOver().write(tmp_path / "none") is None and not (tmp_path / "none").exists()
    (tmp_path / CARRY_OVER).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot be read"):
        CarryOver.read(tmp_path)


@pytest.mark.usefixtures("measured_once")
def test_updates_are_counted_along_the_chain(base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Mock(side_effect=trainer.learning_rate)
    monkeypatch.setattr(trainer, "learning_rate", watched)
    falling = {"kind": "rsqrt", "peak": 1e-3, "warmup_steps": 1, "anneal_steps": 0, "updates": "rsqrt"}
    plan = recipe("rsqrt", max_steps=4, schedule=falling)
    incumbent = memory = None
    for update in range(2):
        done = run(base, tmp_path / str(update), recipe=plan, incumbent=incumbent, carry_over=memory, seed=update)
        incumbent, memory = done.directory, done.carry_over
        assert memory is not None and CarryOver.read(memory).updates == update + 1
    assert [call.args[-1] for call in watched.call_args_list] == [0] * 4 + [1] * 4


@pytest.mark.usefixtures("measured_once")
def test_only_a_recipe_that_goes_on_from_what_was_trained_starts_there(base: ClipBase, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", recipe=recipe("finetuned-merge", max_steps=3))
    after = {"incumbent": first.directory, "pools": pools(replay=12), "seed": 5}

    def second(name: str, memory: Path | None) -> str:
        plan = recipe(name, max_steps=3)
        return run(base, tmp_path / f"{name}-{memory is None}", recipe=plan, carry_over=memory, **after).adapter

    assert second("finetuned-merge", first.carry_over) != second("finetuned-merge", None)
    assert second("ema-merge", first.carry_over) == second("ema-merge", None)


LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


class Reads:
    """Pools that count reads of their images."""

    def __init__(self, new: int, reference: int) -> None:
        self.counts: Counter[str] = Counter()
        tags = ("car", new), ("house", reference)
        self.pools = Pools(*(tuple(map(self.counting, pairs(tag, count))) for tag, count in tags))

    def counting(self, pair: Pair) -> Pair:
        return replace(pair, read=partial(self.read, pair.id, pair.read))

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


def test_a_resumed_update_prepares_no_shard_again_and_is_charged_the_same(base: ClipBase, tmp_path: Path) -> None:
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


def test_damaged_pictures_are_left_out_and_named_also_after_a_stop(base: ClipBase, tmp_path: Path) -> None:
    result = run(base, tmp_path / "whole", recipe=LEARNED, pools=spoiled((1, 6)))
    assert set(result.left_out) == {"car-1", "car-6"} and result.steps == 4
    assert "header" in result.left_out["car-1"]
    cost = cost_of(result)
    assert cost["left_out"] == 2 and list(cost["left_out_samples"]) == ["car-1", "car-6"] and NAMED >= 2
    parts = resumed(partial(run, base, tmp_path, recipe=LEARNED, pools=spoiled((1, 6))), 3)
    assert (parts.adapter, parts.left_out, parts.maf) == (result.adapter, result.left_out, result.maf)
    assert result.adapter != run(base, tmp_path / "good", recipe=LEARNED, pools=spoiled(())).adapter


@pytest.mark.usefixtures("measured_once")
def test_a_batch_of_bad_pictures_is_passed_over_and_an_update_of_them_fails(base: ClipBase, tmp_path: Path) -> None:
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
