"""Processes, also on several machines, that take the steps of one update, by Ray Train. It starts them with a torch
process group, and ends all of them when one ends; then all start again from the update's own checkpoint. The updater's
messages to them are in a file of the work folder, which all of them see."""

from __future__ import annotations

import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.errors import RatchetError, TrainingError
from core.files import replacing
from core.progress import progress_log
from core.settings import Settings
from updater.step.passes import Team, TorchTeam
from updater.training.checkpoint import read_json, write_json

LOOK_SECONDS: Final = 0.5
REPORT_SECONDS: Final = 10.0
STOP_SECONDS: Final = 60.0
"""Time for workers to finish a step; unsaved work is repeated."""
ATTEMPTS: Final = 5
"""For workers that end without an error (killed, out of memory, a lost node), consecutive."""
Steps = Callable[[Team, "Control"], None]


class Stopped(Exception):
    """Training was asked to stop; progress is in the checkpoint."""


class Control:
    def __init__(self, work_dir: Path) -> None:
        self._path = work_dir / "control.json"
        self._progress = work_dir / "progress.txt"
        self._written: dict[str, Any] = {}

    def write(self, stop: bool, duty_cycle: float) -> None:
        values = {"stop": stop, "duty_cycle": duty_cycle}
        if values != self._written:
            write_json(self._path, values)
            self._written = values

    def stop(self) -> bool:
        return bool(self._read().get("stop", False))

    def duty_cycle(self) -> float:
        return float(self._read().get("duty_cycle", 1.0))

    def report(self, line: str) -> None:
        """Report progress to the updater. Not durable, as it is called in every step."""
        with replacing(self._progress, durable=False) as staging:
            staging.write_text(line)

    def reported(self) -> str:
        with suppress(FileNotFoundError):
            return self._progress.read_text()
        return ""

    def _read(self) -> dict[str, Any]:
        values = read_json(self._path)
        return values if isinstance(values, dict) else {}


@dataclass(frozen=True)
class Workers:
    """``count`` processes of ``threads`` threads each, with a GPU each if ``gpus``."""

    count: int
    threads: int
    gpus: bool = False
    address: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Workers | None:
        """Workers from the settings; None: this process alone."""
        updater = settings.updater
        if updater.workers == 1:
            return None
        on_gpus = updater.workers_on_gpus
        gpus = torch.cuda.is_available() if on_gpus == "auto" else on_gpus == "always"
        return cls(updater.workers, updater.threads, gpus, updater.ray_address)

    def run(
        self, steps: Steps, work_dir: Path, stop: Callable[[], bool] = lambda: False,
        duty_cycle: Callable[[], float] = lambda: 1.0,
    ) -> None:  # fmt: skip
        """Take all steps of an update. ``steps``: called in each process with the team. ``work_dir``: of the update; on
        a file system that all processes see. Raises Stopped: ``stop()``; progress is in the checkpoint; RatchetError:
        raised by a worker; TrainingError: workers ended repeatedly."""
        control = Control(work_dir)
        control.write(False, duty_cycle())
        failures: list[BaseException] = []

        def fit() -> None:
            try:
                self._fit(steps, work_dir)
            except BaseException as error:
                failures.append(error)

        fitting = threading.Thread(target=fit, name="ray-train", daemon=True)
        fitting.start()
        reported, patience = time.monotonic(), math.inf
        while fitting.is_alive() and time.monotonic() < patience:
            if patience == math.inf and stop():
                patience = time.monotonic() + STOP_SECONDS
            control.write(patience < math.inf, duty_cycle())
            fitting.join(LOOK_SECONDS)
            if time.monotonic() - reported > REPORT_SECONDS and (line := control.reported()):
                progress_log.info(f"training: {line}")
                reported = time.monotonic()
        if failures:
            raise failures[0]
        if patience < math.inf:
            raise Stopped

    def _fit(self, steps: Steps, work_dir: Path) -> None:
        import ray
        from ray.train.v2.api.exceptions import TrainingFailedError

        begins = not ray.is_initialized()
        if begins:
            # Ray starts the processes with a shell, and quotes all but the path of Python, which may contain a space.
            python = {"py_executable": shlex.quote(sys.executable)}
            local: dict[str, Any] = {
                "num_cpus": self.threads * self.count, "include_dashboard": False, "runtime_env": python
            }  # fmt: skip
            options = {"address": self.address} if self.address else {"address": "local", **local}
            ray.init(log_to_driver=False, configure_logging=False, **options)
        try:
            for attempt in range(1, ATTEMPTS + 1):
                progress_log.info(
                    f"training in {self.count} processes" + (f", attempt {attempt}" if attempt > 1 else "")
                )
                try:
                    self._trainer(steps, work_dir).fit()
                except TrainingFailedError as error:
                    if (cause := _raised_by_worker(error)) is not None:
                        raise cause from error
                    progress_log.info(f"a training process ended: {str(error).splitlines()[-1][:200]}")
                else:
                    return
        finally:
            if begins:
                ray.shutdown()
        raise TrainingError(
            f"training processes ended {ATTEMPTS} times without saying why.",
            "Look for `Out of memory` in the system's log; lower updater.workers, or the recipe's micro_batch.",
        )

    def _trainer(self, steps: Steps, work_dir: Path) -> Any:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        resources: dict[str, float] = {"CPU": self.threads, "GPU": int(self.gpus)}
        return TorchTrainer(
            _work,
            train_loop_config={"steps": steps, "work_dir": work_dir.resolve(), "cwd": Path.cwd()},
            scaling_config=ScalingConfig(num_workers=self.count, use_gpu=self.gpus, resources_per_worker=resources),
            run_config=RunConfig(name="train", storage_path=str((work_dir / "ray").resolve())),
            torch_config=TorchConfig(backend="nccl" if self.gpus else "gloo"),
        )


def _work(config: dict[str, Any]) -> None:
    os.chdir(config["cwd"])  # the settings' paths may be relative
    with suppress(Stopped):
        config["steps"](TorchTeam(), Control(config["work_dir"]))


def _raised_by_worker(error: BaseException) -> RatchetError | None:
    for failure in getattr(error, "worker_failures", {}).values():
        each: BaseException | None = failure
        while each is not None:
            if isinstance(each, RatchetError):
                return each
            each = getattr(each, "_base_exc", None) or getattr(each, "cause", None) or each.__cause__
    return None
