"""Reports the progress of a start: when each model answers and, until then, why it does not."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from typing import Final

from core.errors import ConfigError
from core.ledger.rows import Family
from core.progress import progress_log
from core.waiting import StoodStill, wait_for_progress
from ratchet_client import Client, ServerError
from serving.ray.deployment_status import DeploymentStatus

NAMES: Final[Mapping[Family, str]] = {"clip": "CLIP", "vlm": "the VLM"}
LOOK_SECONDS: Final = 0.2
STATUS_SECONDS: Final = 1.0
"""Serve's controller is busy during a start, so it is not asked more often."""
Statuses = Callable[[], Mapping[str, DeploymentStatus]]


class StartProgress:
    """Progress of one server, by its own readiness. Use from one thread."""

    def __init__(
        self, client: Client, models: Collection[Family], statuses: Statuses | None = None, began: float | None = None
    ) -> None:
        """``statuses``: reads Serve's deployments by name, if possible. ``began``: on the monotonic clock; None for
        now."""
        self._client = client
        self._waiting = [model for model in NAMES if model in models]
        self._statuses = statuses
        self._statuses_due = 0.0
        self._ended: set[str] = set()
        self._running: list[str] = []
        self._last_problems: dict[Family, str] = {}
        self._began = time.monotonic() if began is None else began

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def look(self) -> bool:
        """Ask the models that have not answered yet, and print changes. Returns whether all have answered. Raises
        ConfigError when a deployment has failed for good before CLIP answers."""
        self._look_at_deployments()
        for model in list(self._waiting):
            problem = self._client.why_not_ready(model)
            if not problem:
                self._waiting.remove(model)
                progress_log.info(f"{NAMES[model]} answers on {self._client.url} after {self.seconds:.1f} s")
            elif problem != self._last_problems.get(model):
                progress_log.info(f"{NAMES[model]} after {self.seconds:.0f} s: {problem}")
                self._last_problems[model] = problem
        return not self._waiting

    def wait_for(self, model: Family, work: Callable[[], object], check: Callable[[], object] = lambda: None) -> None:
        """Return when a model answers. ``work``: a sign of activity, see :func:`core.waiting.wait_for_progress`.
        ``check``: called before each look; may raise to end the wait. Raises ConfigError as :meth:`look`, and
        ServerError when there is no progress any more."""

        def answers() -> bool:
            check()
            self.look()
            return model not in self._waiting

        def how_far() -> str:
            return ", ".join([self._last_problems.get(model, "no answer"), *(f"{name} runs" for name in self._running)])

        try:
            wait_for_progress(answers, how_far, work=work, pause=LOOK_SECONDS)
        except StoodStill as error:
            raise ServerError(f"{NAMES[model]} does not start: {error}", "Look at the server's log.") from None

    def _look_at_deployments(self) -> None:
        if self._statuses is None or time.monotonic() < self._statuses_due:
            return
        self._statuses_due = time.monotonic() + STATUS_SECONDS
        statuses: Mapping[str, DeploymentStatus] = {}
        with contextlib.suppress(Exception):  # Serve's controller is busy: ask the models only
            statuses = self._statuses()
        for name, status in statuses.items():
            if name in self._ended:
                continue
            if status.failed and "clip" in self._waiting:
                raise ConfigError(f"{name} cannot start: {status.cause}", "Look at the server's log.")
            if status.failed:
                progress_log.error(f"{name} cannot start: {status.cause}")
            if status.running or status.failed:
                self._ended.add(name)
                self._running += [name] if status.running else []
                progress_log.info(f"{name} {'runs' if status.running else 'failed'} after {self.seconds:.1f} s")
