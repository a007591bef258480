from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.exceptions import WorkerGroupError
from torch import distributed

from core.addresses import free_port
from core.errors import ConfigError, TrainingError
from serving.engines.clip_base import ClipBase
from streams.store.sample_store import SampleStore
from tests.support.forked import ForkedProcess, import_ahead
from tests.support.ray_steps import killed_once
from tests.unit.updater.builders import LIMITS, recipe, run
from updater.adapters import read_delta
from updater.data.pools import StoredExamples
from updater.families.clip_learner import ClipLearner
from updater.step.learner import Learner
from updater.step.passes import Team
from updater.training.result import TrainResult
from updater.training.workers import Control, Steps, Stopped, Workers, _raised_by_worker, _work

import_ahead("updater.training.train", "updater.families", "tests.unit.updater.builders")
STEPS = 6
PLAN = recipe(max_steps=STEPS, batch_size=9)  # of which one process has four rows, and the other one five
UPDATE = Learner.optimizer_step


@pytest.fixture(scope="module", autouse=True)
def taken_elsewhere() -> Iterator[pytest.MonkeyPatch]:
    """Fail if a step is taken in this process, unless a test allows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "optimizer_step", lambda *_: pytest.fail("a step is taken here"))
        yield patch


class ForkedWorkers(Workers):
    """The same processes and process group without Ray, which takes half a minute to start them."""

    def __init__(self) -> None:
        super().__init__(count=2, threads=1)

    def _fit(self, steps: Steps, work_dir: Path) -> None:
        assert self._exit_codes(steps, work_dir) == [0, 0]

    def _exit_codes(self, steps: Steps, work_dir: Path) -> list[int]:
        work = cloudpickle.dumps({"steps": steps, "work_dir": work_dir, "cwd": Path.cwd()})
        port, logs = free_port(), work_dir.parent
        processes = [ForkedProcess(logs / f"{rank}.log", _in_team, rank, port, work) for rank in range(self.count)]
        codes = [process.wait(300) for process in processes]
        print(*(process.output() for process in processes), sep="\n")
        return codes


def _in_team(rank: int, port: int, work: bytes) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    _work(pickle.loads(work))
    distributed.destroy_process_group()


class MortalWorkers(ForkedWorkers):
    """The second process is killed in its third step; then both are restarted, as Ray Train does."""

    def _fit(self, steps: Steps, work_dir: Path) -> None:
        mortal = partial(_mortal, work_dir.parent / "killed", steps)
        first, second = self._exit_codes(mortal, work_dir)
        assert (first, second) == (1, -signal.SIGKILL), "the other one does not wait for it"
        super()._fit(mortal, work_dir)


def _mortal(mark: Path, steps: Steps, team: Team, control: Control) -> None:
    update = Learner.optimizer_step

    def deadly(self: Learner[Any], *args: Any, **options: Any) -> None:
        update(self, *args, **options)
        if team.rank == 1 and args[1] == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Learner.optimizer_step = deadly  # type: ignore[method-assign]
    steps(team, control)


def trained(base: ClipBase, folder: Path, workers: Workers | None, **options: Any) -> TrainResult:
    limits = replace(LIMITS, checkpoint_steps=1, threads=1)
    return run(base, folder, **{"recipe": PLAN, "limits": limits, "workers": workers, **options})


@pytest.fixture(scope="module")
def undisturbed(
    taken_elsewhere: pytest.MonkeyPatch, base: ClipBase, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    """By two processes."""
    return trained(base, tmp_path_factory.mktemp("undisturbed"), ForkedWorkers())


def test_two_processes_come_to_the_adapter_of_one(
    base: ClipBase, tmp_path: Path, undisturbed: TrainResult, taken_elsewhere: pytest.MonkeyPatch
) -> None:
    with taken_elsewhere.context() as here:
        here.setattr(Learner, "optimizer_step", UPDATE)
        alone = trained(base, tmp_path / "alone", None)
    assert undisturbed.steps == alone.steps == STEPS
    assert undisturbed.maf == pytest.approx(alone.maf, rel=0.05) and undisturbed.visited == alone.visited
    assert undisturbed.maf >= alone.maf, "the loss, which each process computes, is counted in each"
    micro = trained(base, tmp_path / "micro", ForkedWorkers(), recipe=PLAN.model_copy(update={"micro_batch": 2}))
    for found in (alone, micro):
        assert undisturbed.losses["loss"] == pytest.approx(found.losses["loss"], abs=1e-5)
    theirs, ours = (read_delta(result.directory, base) for result in (undisturbed, alone))
    assert theirs.keys() == ours.keys() and ours
    for name, part in ours.items():
        torch.testing.assert_close(theirs[name].dense(), part.dense(), rtol=0, atol=1e-5)
        assert part.dense().abs().max() > 1e-4, "what is compared was learned"


@pytest.mark.long
def test_killed_and_started_again_they_end_the_same(base: ClipBase, tmp_path: Path, undisturbed: TrainResult) -> None:
    result = trained(base, tmp_path, MortalWorkers())
    assert (result.adapter, result.losses) == (undisturbed.adapter, undisturbed.losses)


@pytest.mark.long
def test_when_one_is_killed_ray_train_starts_all_again(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    Workers(count=2, threads=1).run(partial(killed_once, tmp_path), work)
    assert (tmp_path / "killed").exists()
    assert [(tmp_path / f"{rank}-of-2").read_text() for rank in range(2)] == ["3.0", "3.0"]
    assert Control(work).reported() == f"in {Path.cwd()}"


@pytest.mark.long
def test_asked_to_stop_they_leave_a_checkpoint(base: ClipBase, tmp_path: Path, undisturbed: TrainResult) -> None:
    control = tmp_path / "work" / "control.json"
    with pytest.raises(Stopped):  # once they are about to begin
        trained(base, tmp_path, ForkedWorkers(), stop=control.exists)
    assert (tmp_path / "work" / "checkpoint.safetensors").exists()
    result = trained(base, tmp_path, ForkedWorkers())
    assert (result.adapter, len(result.losses["loss"])) == (undisturbed.adapter, STEPS)


def test_what_a_process_raised_is_told_and_not_that_others_waited_for_it_in_vain() -> None:
    lost, raised = RuntimeError("Connection closed by peer"), TrainingError("it diverged.", "Slower.")
    error = WorkerGroupError("both", {0: lost, 1: UserExceptionWithTraceback(raised, "")})
    cause = _raised_by_worker(error)
    assert isinstance(cause, TrainingError) and cause.fix == "Slower."
    assert _raised_by_worker(WorkerGroupError("one", {0: lost})) is None


def test_a_recipe_that_needs_each_terms_gradient_is_refused(base: ClipBase) -> None:
    team = Team()
    team.size = 2
    with pytest.raises(ConfigError, match="harmonize") as caught:
        ClipLearner(base, recipe(gradients={"harmonize": True}), {}, 0).join(team)
    assert "updater.workers" in caught.value.fix


def test_the_examples_of_a_draw_are_read_by_other_processes_from_the_same_version(tmp_path: Path) -> None:
    drawn = StoredExamples(SampleStore(str(tmp_path)), 7, np.arange(3, dtype=np.uint64), "vlm")
    again = pickle.loads(pickle.dumps(drawn))
    assert (len(again), again.family, again._version, again._store.lake) == (3, "vlm", 7, str(tmp_path))
