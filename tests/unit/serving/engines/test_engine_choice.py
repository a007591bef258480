from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import BaseModels, Serve
from serving.engines import engine_choice
from serving.engines.backends import FLOAT32, EngineChoice, Processor, usable_cores
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.engine_choice import Measurement, best_of, choose_engine, measure, possible
from serving.engines.tuning import Layout, Tuning, accepted, layouts_of, run_layout

CPU = torch.device("cpu")
HALF, ONNX_HALF = EngineChoice("torch", "bfloat16"), EngineChoice("onnx", "bfloat16")


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice, "SMALL_BYTES", 0)
    monkeypatch.setattr(engine_choice, "find_spec", lambda name: None)
    monkeypatch.setattr(engine_choice, "processor", lambda device: Processor("Xeon", amx=True, avx512_bf16=True))


def test_a_processor_is_tried_at_the_precision_that_it_has_instructions_for(
    base: ClipBase, amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = {
        Processor("old"): [], Processor("EPYC", avx512_bf16=True): ["bfloat16"],
        Processor("Xeon", amx=True): ["bfloat16"], Processor("P100", cuda=(6, 0)): [],
        Processor("T4", cuda=(7, 5)): ["float16"], Processor("H100", cuda=(9, 0)): ["bfloat16"],
    }  # fmt: skip
    for each, half in tried.items():
        monkeypatch.setattr(engine_choice, "processor", lambda device, each=each: each)
        assert [choice.precision for choice in possible(base, Serve(), CPU)] == ["float32", *half], each


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


@pytest.mark.parametrize(("onnx_seconds", "expected"), [(0.048, HALF), (0.04, ONNX_HALF)])
def test_of_engines_as_fast_torch_is_taken(onnx_seconds: float, expected: EngineChoice) -> None:
    seconds = {FLOAT32: 0.1, HALF: 0.05, EngineChoice("onnx"): 0.09, ONNX_HALF: onnx_seconds}
    assert best_of([Measurement(choice, (each,) * 4) for choice, each in seconds.items()]) == expected


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

    rows = [*tuning().engines, Measurement(ONNX_HALF, (0.2, 0.05), 0.9999)]
    assert Tuning(accepted(rows, objection), {}, []).choice == FLOAT32
    assert asked == [HALF, ONNX_HALF]  # the fastest first; float32 needs no leave
    assert Tuning(accepted(rows, lambda choice: ""), {}, []).choice == HALF


def test_an_encoder_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 encoders with 1 threads did not start or end"):
        run_layout(tmp_path, "missing", FLOAT32, Layout(1, 1), batch=1, seconds=0.1)
