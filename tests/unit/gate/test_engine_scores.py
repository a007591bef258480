"""Half precision is compared with float32 by the scores of the base on suites."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.engines.backends import EngineChoice
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_base
from tests.unit.gate.builders import folder_dataset
from updater.gate.gate_command import EngineScore, engine_scores
from updater.gate.suites import Suite, load_suites


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> list[Suite]:
    home = tmp_path_factory.mktemp("home")
    folder_dataset(home / "data" / "things")
    (home / "things.yaml").write_text("task: retrieval\ndata: ${home}/data/things\n")
    return load_suites([home / "things.yaml"], home)


def test_the_base_is_scored_in_both_precisions(suites: list[Suite], tmp_path: Path) -> None:
    (row,) = engine_scores(tiny_base(tmp_path), EngineChoice("torch", "bfloat16"), suites, threads=1)
    assert (row.suite, row.items) == ("things", len(suites[0].items()))
    assert row.within_noise
    assert row.noise > 0


def test_a_precision_that_answers_otherwise_is_found(
    suites: list[Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ClipEngine.encode_images

    def blurred(self: ClipEngine, pixels: object, adapter: str | None = None) -> object:
        vectors = images(self, pixels, adapter)  # type: ignore[arg-type]
        return vectors if self.choice.precision == "float32" else vectors[::-1].copy()

    monkeypatch.setattr(ClipEngine, "encode_images", blurred)
    (row,) = engine_scores(tiny_base(tmp_path), EngineChoice("torch", "bfloat16"), suites, threads=1)
    assert row.served != row.float32


def test_noise_is_the_standard_error_of_the_score() -> None:
    assert EngineScore("s", 100, 0.5, 0.54, 0.05).within_noise
    assert not EngineScore("s", 100, 0.5, 0.56, 0.05).within_noise
