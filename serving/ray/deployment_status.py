"""The deployments of an application as Serve reports them. Serve routes requests as soon as the ingress has a replica
(``ServeController.get_target_groups``), so a deployment that starts late, or never, does not affect the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

MAX_CAUSE_CHARS: Final = 300
_EXCEPTION: Final = re.compile(r"^[\w.]+(?:Error|Exception|Unavailable|Interrupt|Exit)\b.*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    states: Mapping[str, int]
    """Replicas by Serve's state: ``RUNNING``, ``STARTING``, ``STOPPING``."""
    failed: bool
    """Serve has given up."""
    cause: str
    """Reason that the last replica could not start; empty when none has failed."""

    @property
    def running(self) -> int:
        return self.states.get("RUNNING", 0)


def read_statuses(app: str) -> dict[str, DeploymentStatus]:
    """Statuses of an application's deployments by name; empty before Serve has created it. Blocks for some 10 ms,
    longer while Serve's controller is busy."""
    from ray import serve

    application = serve.status().applications.get(app)
    if application is None:
        return {}
    return {
        name: DeploymentStatus(
            states={str(state): count for state, count in each.replica_states.items()},
            failed=each.status == "DEPLOY_FAILED",
            cause=cause_of(each.message),
        )
        for name, each in application.deployments.items()
    }


def cause_of(message: str) -> str:
    """The exception that ended a replica's start (``OSError: no file``), from Serve's message with its traceback."""
    _, separator, traceback = message.partition("Error:\n")
    if not separator:
        return ""
    lines = _EXCEPTION.findall(traceback) or traceback.strip().splitlines() or [""]
    return lines[-1].strip()[:MAX_CAUSE_CHARS]
