"""An ingest that stops itself once (SIGSTOP) at a chosen point, and goes on from there when it is continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from core.settings import Settings
from streams.ingest.consumer import run_ingest
from streams.ingest.quarantine import QuarantinePublisher
from streams.kafka.outbox import FencedSender
from streams.store.writer import StoreWriter


def asleep_before(owner: type, name: str) -> None:
    """Stop before the first call of a method, and make the call once continued."""
    method: Callable[..., Any] = getattr(owner, name)
    slept: list[bool] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not slept and (owner is not QuarantinePublisher or args[2]):  # it is given what to publish
            slept.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return method(*args, **kwargs)

    setattr(owner, name, call)


POINTS: dict[str, tuple[type, str]] = {
    "before_the_commit": (StoreWriter, "commit"),
    "between_commit_and_publish": (QuarantinePublisher, "publish"),
    "before_its_sender_is_open": (FencedSender, "open"),
    "between_reading_back_and_sending": (FencedSender, "send_all"),
    "with_its_ownership_checked": (FencedSender, "_send"),
}


def run(settings: Settings, point: str) -> None:
    """Run until asked to stop. ``point``: one of :data:`POINTS`."""
    asleep_before(*POINTS[point])
    run_ingest(settings)
