from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import precision
from core.settings import Settings
from core.settings.serving import BaseModels
from core.settings.updates import Gate
from serving.engines.processor import Processor
from tests.support.tiny import tiny_base
from tests.unit.updater.gate.builders import folder_dataset


def test_answers_of_each_precision_are_compared_with_those_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, suites = folder_dataset(tmp_path / "things", count=40), []
    for task in ("retrieval", "classification"):
        suites.append(tmp_path / f"{task}.yaml")
        suites[-1].write_text(f"task: {task}\ndata: {data}\n")
    tiny_base(tmp_path)
    settings = Settings(home=tmp_path, base=BaseModels(clip="tiny"), gate=Gate(suites=suites))
    monkeypatch.setattr(precision, "processor", lambda device: Processor("Xeon", amx=True, avx512_bf16=True))
    precision.main(settings, ["--max-items", "30"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = figures["suites"]
    assert [(row["precision"], row["suite"], row["answers"]) for row in rows] == [
        ("bfloat16", "retrieval", 60), ("bfloat16", "classification", 30),
        ("int8", "retrieval", 60), ("int8", "classification", 30),
    ]  # fmt: skip
    for row in rows:
        assert 0.6 < row["same"] <= 1 and abs(row["score"] - row["score_float32"]) <= 1 - row["same"]
        assert 0.99 < row["cosine_image"] < 1 and 0.99 < row["cosine_text"] < 1
    assert figures["same"]["int8"] == pytest.approx((2 * rows[2]["same"] + rows[3]["same"]) / 3)
