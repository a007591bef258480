"""What follows from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from serving.engines.backends import FLOAT32, EngineChoice
from serving.engines.engine_choice import Measurement
from serving.engines.tuning import Layout, Tuning, accepted, layouts_of, run_layout

HALF = EngineChoice("torch", "bfloat16")


def tuning(*layouts: Layout) -> Tuning:
    engines = [Measurement(FLOAT32, (0.4, 0.1)), Measurement(HALF, (0.1, 0.05), 0.9999)]
    return Tuning(engines, {1: 40.0, 4: 70.0, 8: 97.0, 16: 100.0, 32: 99.0}, list(layouts))


def test_the_smallest_good_batch_and_the_fewest_fast_processes_are_taken() -> None:
    slow = tuning(Layout(1, 8, 100.0), Layout(2, 4, 108.0), Layout(4, 2, 110.0))
    assert slow.settings == {
        "engine": "torch", "precision": "bfloat16", "encoder_replicas": 1, "encoder_threads": 8, "max_batch": 8,
    }  # fmt: skip
    assert tuning(Layout(1, 8, 100.0), Layout(2, 4, 180.0), Layout(4, 2, 185.0)).layout == Layout(2, 4, 180.0)


def test_cores_are_shared_by_halves() -> None:
    assert layouts_of(8) == [Layout(1, 8), Layout(2, 4), Layout(4, 2), Layout(8, 1)]
    assert layouts_of(2) == [Layout(1, 2), Layout(2, 1)]
    assert layouts_of(1) == [Layout(1, 1)]
    assert layouts_of(96)[-1] == Layout(8, 12)


def test_half_precision_that_is_objected_to_is_not_chosen() -> None:
    asked = []

    def objection(choice: EngineChoice) -> str:
        asked.append(choice)
        return "other scores"

    onnx = EngineChoice("onnx", "bfloat16")
    rows = [*tuning().engines, Measurement(onnx, (0.2, 0.05), 0.9999)]
    assert Tuning(accepted(rows, objection), {}, []).choice == FLOAT32
    assert asked == [HALF, onnx]  # the fastest first; float32 needs no leave
    assert Tuning(accepted(rows, lambda choice: ""), {}, []).choice == HALF


def test_an_encoder_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 encoders with 1 threads did not start or end"):
        run_layout(tmp_path, "missing", FLOAT32, Layout(1, 1), batch=1, seconds=0.1)
