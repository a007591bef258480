"""What an update really spent, operation by operation, against what it planned and what the ledger is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.engines.base import ClipBase
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import pools, recipe, run
from updater.cost import counted
from updater.families.clip.learner import ClipLearner
from updater.recipes import Recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[float]:
    """GFLOPs of every call of a method of the learner, from now on."""
    real: Callable[..., Any] = getattr(ClipLearner, name)
    calls: list[float] = []

    def counting(self: ClipLearner, *given: Any) -> Any:
        with counted() as flops:
            made = real(self, *given)
        calls.append(flops.get_total_flops() / 1e9)
        return made

    monkeypatch.setattr(ClipLearner, name, counting)
    return calls


LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


@pytest.mark.parametrize(
    ("plan", "incumbent"),
    [
        pytest.param(recipe("default"), False, id="default"),
        pytest.param(recipe("default", **LAST), True, id="last blocks over an incumbent"),
        pytest.param(recipe("locked-image"), False, id="locked image tower"),
        pytest.param(recipe("locked-text"), True, id="locked text tower over an incumbent"),
        pytest.param(recipe("naive"), False, id="naive"),
    ],
)
def test_an_update_spends_what_it_planned_within_two_percent(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Recipe, incumbent: bool
) -> None:
    """Also in preparation, where a locked tower that an incumbent has changed is run twice."""
    start = run(base, tmp_path / "before").directory if incumbent else None
    prepared = recorded(monkeypatch, "prepare")
    steps = recorded(monkeypatch, "backward")
    pool = pools(new=14, reference=0 if plan.name == "naive" else 14, replay=0 if plan.name == "naive" else 10)
    result = run(base, tmp_path, recipe=plan, pools=pool, incumbent=start)
    probe, *taken = steps
    assert (len(prepared), len(taken)) == (1, result.steps)
    assert probe == pytest.approx(sum(taken) / len(taken), rel=0.02)
    spent = sum(prepared) + sum(taken)
    ratio = result.cost["memory_ratio"]
    assert result.maf_planned / ratio == pytest.approx(spent, rel=0.02)
    assert result.maf / ratio == pytest.approx(spent, rel=0.02)
