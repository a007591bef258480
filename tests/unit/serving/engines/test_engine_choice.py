from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.settings import Settings
from core.settings.serving import BaseModels, Serve
from serving.engines import engine_choice
from serving.engines.backends import FLOAT32, EngineChoice, Processor, usable_cores
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.engine_choice import Measurement, best_of, choose_engine, measure, possible

CPU = torch.device("cpu")
HALF, ONNX_HALF = EngineChoice("torch", "bfloat16"), EngineChoice("onnx", "bfloat16")


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "SMALL_BYTES", 0)
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    monkeypatch.setattr(engine_choice, "processor", lambda device: Processor("Xeon", amx=True, avx512_bf16=True))


def test_a_small_base_runs_in_float32_unless_something_is_set(
    base: ClipBase, tmp_path: Path, amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "SMALL_BYTES", base.weights_bytes + 1)
    assert choose_engine(base, Serve(), tmp_path, CPU) == FLOAT32
    assert choose_engine(base, Serve(precision="bfloat16"), tmp_path, CPU) == HALF, "what is set is not measured"
    assert possible(base, Serve(engine="onnx"), CPU) == [EngineChoice("onnx")]
    assert not (tmp_path / "engines").exists()


def test_what_is_installed_is_tried_unless_set(base: ClipBase, amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: object())
    every = [FLOAT32, HALF, EngineChoice("onnx"), ONNX_HALF]
    assert possible(base, Serve(), CPU) == every
    assert possible(base, Serve(precision="bfloat16"), CPU) == [HALF, ONNX_HALF]
    assert possible(base, Serve(engine="onnx"), CPU) == every[2:]
    assert possible(base, Serve(engine="onnx", precision="float32"), CPU) == [EngineChoice("onnx")]
    assert possible(base, Serve(), torch.device("cuda")) == [FLOAT32, HALF]


@pytest.mark.parametrize(
    ("half", "expected"),
    [
        (Measurement(HALF, (0.1, 0.1), 0.9999), HALF),
        (Measurement(HALF, (0.2, 0.19), 0.9999), FLOAT32),  # no clear gain
        (Measurement(HALF, (0.1, 0.1), 0.98), FLOAT32),  # not within noise
        (Measurement(HALF, (0.1, 0.1), -1.0), FLOAT32),
        (Measurement(HALF, error="RuntimeError: not implemented"), FLOAT32),
    ],
)
def test_half_precision_is_taken_if_clearly_faster_and_within_noise(half: Measurement, expected: EngineChoice) -> None:
    assert best_of([Measurement(FLOAT32, (0.2, 0.2)), half]) == expected


def test_a_machine_measures_a_base_once_and_each_time_where_its_home_cannot_be_written(
    base: ClipBase, tmp_path: Path, amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def measured(*_: object) -> list[Measurement]:
        runs.append(1)
        return [Measurement(FLOAT32, (0.2,) * 4), Measurement(HALF, (0.1,) * 4, 0.9999)]

    monkeypatch.setattr(engine_choice, "measure", measured)
    assert choose_engine(base, Serve(), tmp_path, CPU) == choose_engine(base, Serve(), tmp_path, CPU) == HALF
    assert len(runs) == 1
    next((tmp_path / "engines").glob("*.json")).write_text("{damaged")
    assert choose_engine(base, Serve(), tmp_path, CPU) == HALF
    assert len(runs) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "engines").write_text("a file where the folder should be")
    for _ in range(2):
        assert choose_engine(base, Serve(), tmp_path / "other", CPU) == HALF
    assert len(runs) == 4


def test_candidates_are_measured_against_float32_and_one_that_fails_is_reported(base: ClipBase) -> None:
    broken = EngineChoice("torch", "int3")  # type: ignore[arg-type]
    first, half, failed = measure(base, [FLOAT32, HALF, broken], CPU)
    assert first.cosine > 0.99999
    assert 0.999 < half.cosine < 1
    assert len(half.seconds) == 4 and all(0 < seconds < 10 for seconds in half.seconds)
    assert not failed.usable and "KeyError" in failed.error


def test_gate_and_server_run_the_engine_of_the_settings(base: ClipBase) -> None:
    home = base.directory.parent.parent
    settings = Settings(home=home, base=BaseModels(clip=base.name), serve=Serve(precision="bfloat16"))
    threads = torch.get_num_threads()
    try:
        engine = ClipEngine.of(settings)
        assert torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(threads)
    assert engine.choice == HALF
