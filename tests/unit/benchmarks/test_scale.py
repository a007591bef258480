"""An engine that sleeps, and the bounds of ``ratchet bench scale``. The rest of it is a cluster of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale
from core.errors import ConfigError
from tests.unit.benchmarks.test_benches import tiny_home


def test_an_engine_that_sleeps_answers_for_each_item_after_one_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(scale.time, "sleep", pauses.append)
    engine = scale.SleepingEngine.of(tiny_home(tmp_path), threads=1)
    vectors = engine.encode_texts(["a cat", "a dog", "a bird"])
    assert vectors.shape == (3, engine.base.dim) and pauses == [scale.PASS_SECONDS]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@pytest.mark.parametrize("nodes", ["0", "17"])
def test_nodes_are_bounded(tmp_path: Path, nodes: str) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        scale.main(tiny_home(tmp_path), ["--nodes", nodes])
