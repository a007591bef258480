from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import BaseModels, Serve
from serving.engines import precision as chosen
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.precision import Measurement, best_of, choose_precision, make_backend, measure
from serving.engines.processor import Precision, Processor, usable_cores

CPU = torch.device("cpu")
FLOAT32 = Measurement("float32", (0.3,) * 4)
HALF = Measurement("bfloat16", (0.2,) * 4, 0.9999)


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "SMALL_BYTES", 0)
    monkeypatch.setattr(chosen, "processor", lambda device: Processor("Xeon", amx=True, avx512_bf16=True))


def test_a_small_base_runs_in_float32_unless_something_is_set(
    base: ClipBase, tmp_path: Path, amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "SMALL_BYTES", base.weights_bytes + 1)
    assert choose_precision(base, Serve(), tmp_path, CPU) == "float32"
    assert choose_precision(base, Serve(precision="int8"), tmp_path, CPU) == "int8", "what is set is not measured"
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (Processor("Zen 2"), ["float32"]),
        (Processor("Cascade Lake", vnni=True), ["float32", "int8"]),
        (Processor("Zen 4", avx512_bf16=True, vnni=True), ["float32", "bfloat16", "int8"]),
        (Processor("Sapphire Rapids", amx=True, avx512_bf16=True), ["float32", "bfloat16", "int8"]),
        (Processor("Volta", cuda=(7, 0)), ["float32", "float16"]),
        (Processor("Hopper", vnni=True, cuda=(9, 0)), ["float32", "bfloat16"]),
    ],
)
def test_what_the_processor_has_instructions_for_is_tried(processor: Processor, expected: list[Precision]) -> None:
    assert processor.precisions == expected


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([HALF], "bfloat16"),
        ([Measurement("bfloat16", (0.28,) * 4, 0.9999)], "float32"),  # no clear gain
        ([Measurement("bfloat16", (0.2,) * 4, 0.98)], "float32"),  # not within noise
        ([Measurement("bfloat16", (0.2,) * 4, -1.0)], "float32"),
        ([Measurement("bfloat16", error="RuntimeError: not implemented")], "float32"),
        ([HALF, Measurement("int8", (0.15,) * 4, 0.9995)], "int8"),
        ([HALF, Measurement("int8", (0.19,) * 4, 0.9995)], "bfloat16"),  # no clear gain over what is more exact
        ([HALF, Measurement("int8", (0.1,) * 4, 0.99)], "bfloat16"),
        ([Measurement("bfloat16", (0.4,) * 4, 0.9999), Measurement("int8", (0.2,) * 4, 0.9995)], "int8"),
    ],
)
def test_a_precision_is_taken_if_clearly_faster_than_more_exact_ones_and_within_noise(
    others: list[Measurement], expected: Precision
) -> None:
    assert best_of([FLOAT32, *others]) == expected


def test_a_machine_measures_a_base_once_and_each_time_where_its_home_cannot_be_written(
    base: ClipBase, tmp_path: Path, amx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def measured(*_: object) -> list[Measurement]:
        runs.append(1)
        return [FLOAT32, HALF]

    monkeypatch.setattr(chosen, "measure", measured)
    assert (
        choose_precision(base, Serve(), tmp_path, CPU)
        == choose_precision(base, Serve(), tmp_path, CPU)
        == HALF.precision
    )
    assert len(runs) == 1
    file = next((tmp_path / "engines").glob("*.json"))
    for number, damaged in enumerate(("{damaged", '{"precision": "int3"}', "[]")):
        file.write_text(damaged)
        assert choose_precision(base, Serve(), tmp_path, CPU) == HALF.precision
        assert len(runs) == 2 + number
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "engines").write_text("a file where the folder should be")
    for _ in range(2):
        assert choose_precision(base, Serve(), tmp_path / "other", CPU) == HALF.precision
    assert len(runs) == 6


def test_candidates_are_measured_against_float32_and_one_that_fails_is_reported(base: ClipBase) -> None:
    broken: Precision = "int3"  # type: ignore[assignment]
    first, half, integers, failed = measure(base, ["float32", "bfloat16", "int8", broken], CPU)
    assert first.cosine > 0.99999
    for other in (half, integers):
        assert 0.999 < other.cosine < 1
        assert len(other.seconds) == 4 and all(0 < seconds < 10 for seconds in other.seconds)
    assert not failed.usable and "KeyError" in failed.error


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_integers_do_not_overflow_on_a_processor_without_vnni(instructions: str) -> None:
    code = """
import torch
from serving.engines.layers import pack, packed_linear
torch.manual_seed(0)
for size in (16, 512):
    weight, inputs = torch.rand(size, size), torch.rand(8, size)
    exact = inputs @ weight.T
    print(((packed_linear(pack(weight, quantized=True), None)(inputs) - exact).abs() / exact).max().item())
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    errors = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert all(float(error) < 0.02 for error in errors.stdout.split()), errors.stdout
    assert len(errors.stdout.split()) == 2


def test_integers_are_for_processors_only(base: ClipBase) -> None:
    with pytest.raises(ConfigError, match="processors only"):
        make_backend("int8", base, base.build_model(), torch.device("cuda"))


def test_gate_and_server_run_in_the_precision_of_the_settings(base: ClipBase) -> None:
    home = base.directory.parent.parent
    settings = Settings(home=home, base=BaseModels(clip=base.name), serve=Serve(precision="int8"))
    threads = torch.get_num_threads()
    try:
        engine = ClipEngine.of(settings)
        assert torch.get_num_threads() == usable_cores()
    finally:
        torch.set_num_threads(threads)
    assert engine.precision == "int8"
