from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import TrainingError
from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import pools, recipe, run
from updater.adapters import Dense, LowRank
from updater.training import trainer as run_module
from updater.training.checkpoint import CARRY_OVER, CarryOver


def test_a_memory_survives_its_file(tmp_path: Path) -> None:
    start = {
        "visual.a.b": LowRank(torch.rand(2, 3, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)),
        "text.ln.weight": Dense(torch.rand(5, dtype=torch.float64)),
    }
    kept = CarryOver(start, {"objective.x/y": torch.arange(3)}, updates=7)
    assert kept.write(tmp_path / "kept") == tmp_path / "kept"
    found = CarryOver.read(tmp_path / "kept")
    assert found.digest == kept.digest != CarryOver(start, {"objective.x/y": torch.arange(3)}, updates=8).digest
    assert found.updates == 7
    assert set(found.start) == set(start) and set(found.terms) == {"objective.x/y"}
    for name, part in start.items():
        pairs = zip(part.tensors(), found.start[name].tensors(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_nothing_to_remember_is_no_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert CarryOver().write(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    (tmp_path / CARRY_OVER).write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="cannot be read"):
        CarryOver.read(tmp_path)


def test_the_number_of_updates_is_counted_along_the_chain(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    real = run_module.learning_rate

    def watched(*arguments: object) -> float:
        rates[-1].append(real(*arguments))  # type: ignore[arg-type]
        return rates[-1][-1]

    monkeypatch.setattr(run_module, "learning_rate", watched)
    falling = {"kind": "rsqrt", "peak": 1e-3, "warmup_steps": 1, "anneal_steps": 0, "updates": "rsqrt"}
    plan = recipe("rsqrt", max_steps=4, schedule=falling)
    incumbent = memory = None
    for update in range(2):
        rates.append([])
        done = run(base, tmp_path / str(update), recipe=plan, incumbent=incumbent, carry_over=memory, seed=update)
        incumbent, memory = done.directory, done.carry_over
        assert memory is not None
        assert CarryOver.read(memory).updates == update + 1
    ratios = [[rate / first for rate, first in zip(row, rates[0], strict=True)] for row in rates[1:]]
    assert ratios[0] == pytest.approx([(2 / 5) ** 0.5] * 4)


def test_only_a_recipe_that_goes_on_from_what_was_trained_starts_there(base: ClipBase, tmp_path: Path) -> None:
    first = run(base, tmp_path / "first", recipe=recipe("finetuned-merge", max_steps=3))
    after = {"incumbent": first.directory, "pools": pools(replay=12), "seed": 5}

    def second(name: str, memory: Path | None) -> str:
        plan = recipe(name, max_steps=3)
        return run(base, tmp_path / f"{name}-{memory is None}", recipe=plan, carry_over=memory, **after).adapter

    assert second("finetuned-merge", first.carry_over) != second("finetuned-merge", None)
    assert second("ema-merge", first.carry_over) == second("ema-merge", None)
