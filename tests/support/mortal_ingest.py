"""An ingest that ends itself with SIGKILL at a chosen point: ``python -m tests.support.mortal_ingest SETTINGS POINT``.

SETTINGS is a JSON file. POINT is one of :data:`POINTS`, or ``never``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lance

from ops.settings import Settings
from streams.batch import Batch
from streams.ingest import run_ingest
from streams.producer import RecordSender
from streams.session import Session
from streams.store import SampleStore


def die(*_: Any, **__: Any) -> NoReturn:
    """End as ``kill -9`` would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


def after(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """``function``, but the process dies right after its ``times``-th call."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls[0] += 1
        if calls[0] == times:
            die()
        return result

    return call


def delivered(function: Callable[..., Any]) -> Callable[..., Any]:
    """``RecordSender.send``, but the process dies when the first record of the third batch of refusals is there."""
    calls = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        future = function(*args, **kwargs)
        calls[0] += 1
        if calls[0] == 3:
            future.result(timeout=20)
            die()
        return future

    return call


#: Where it dies: name -> what arranges it.
POINTS: dict[str, Callable[[], None]] = {
    "files_written_but_not_committed": lambda: setattr(lance.LanceDataset, "commit", staticmethod(die)),
    "committed_but_refusals_not_published": lambda: setattr(Batch, "commit", after(Batch.commit, 2)),
    "some_refusals_of_a_batch_published": lambda: setattr(RecordSender, "send", delivered(RecordSender.send)),
    "refusals_published_but_kafka_not_told": lambda: setattr(Session, "_tell_kafka", die),
    "refusals_recovered_but_not_marked": lambda: setattr(Session, "_mark_published", die),
    "positions_read_but_nothing_else": lambda: setattr(SampleStore, "snapshot", after(SampleStore.snapshot, 3)),
}


def main() -> None:
    """Run until killed or asked to stop."""
    settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
    if sys.argv[2] != "never":
        POINTS[sys.argv[2]]()
    run_ingest(settings)


if __name__ == "__main__":
    main()
