"""``kill -9`` of training at every step, and while a checkpoint is written: the resumed run ends in the same
adapter.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.engines.clip_base import ClipBase
from tests.support.forked import ForkedProcess, import_ahead
from tests.support.sudden_death import die
from tests.unit.updater.builders import LIMITS, recipe, run
from updater.step.learner import Learner
from updater.training import checkpoint

import_ahead("updater.training.train", "updater.families", "tests.unit.updater.builders")
STEPS, EVERY = 4, 2
BACKWARD, SAVE = Learner.forward_backward, checkpoint.save_file


def train(base: ClipBase, folder: Path, last_backward: int, last_save: int) -> None:
    """Train, but die in this backward pass, or in the middle of this write."""
    taken = saved = 0

    def backward(self: Learner[Any], *given: Any, **options: Any) -> Any:
        nonlocal taken
        if taken == last_backward:
            die()
        taken += 1
        return BACKWARD(self, *given, **options)

    def save(tensors: Any, path: Path, **options: Any) -> None:
        nonlocal saved
        SAVE(tensors, path, **options)
        if saved == last_save:
            os.truncate(path, path.stat().st_size // 2)
            die()
        saved += 1

    Learner.forward_backward, checkpoint.save_file = backward, save  # type: ignore[method-assign,assignment]
    made = run(base, folder, recipe=recipe(max_steps=STEPS), limits=replace(LIMITS, checkpoint_steps=EVERY))
    (folder / "result.json").write_text(json.dumps([made.adapter, made.losses["loss"], taken]))


def ended(base: ClipBase, folder: Path, backward: int = -1, save: int = -1) -> tuple[int, Any]:
    folder.mkdir(exist_ok=True)
    code = ForkedProcess(folder / "log", train, base, folder, backward, save).wait(300)
    result = folder / "result.json"
    return code, json.loads(result.read_text()) if result.exists() else None


@pytest.fixture(scope="module")
def whole(base: ClipBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    code, made = ended(base, tmp_path_factory.mktemp("whole"))
    assert (code, made[2]) == (0, 1 + STEPS)  # the first measures what a step costs
    return made


@pytest.mark.long
@pytest.mark.parametrize(("backward", "save", "again"), [(1, -1, 4), (2, -1, 4), (3, -1, 2), (4, -1, 2), (-1, 1, 2)])
def test_training_that_is_killed_anywhere_goes_on_and_ends_in_the_same_adapter(
    base: ClipBase, tmp_path: Path, whole: Any, backward: int, save: int, again: int
) -> None:
    """Killed in backward pass n: the cost is kept after the first, and then every second step."""
    assert ended(base, tmp_path, backward, save) == (-signal.SIGKILL, None)
    assert ended(base, tmp_path) == (0, [*whole[:2], again])
