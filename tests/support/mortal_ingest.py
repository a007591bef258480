"""An ingest that kills itself at a chosen point, or stops itself once (SIGSTOP) until it is continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

from core.settings import Settings
from streams.ingest.consumer import Consumer, run_ingest
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import Membership
from streams.ingest.quarantine import QuarantinePublisher
from streams.kafka.outbox import FencedSender, Outbox
from streams.store.writer import StoreWriter
from tests.support.sudden_death import die


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


def replaced_with_records(self: StoreWriter, base: Any, old: Any, new: Any, marks: Any) -> Any:
    """``StoreWriter._replace``, but the process dies when the files of records are written and not yet committed."""
    if new:
        die()
    return replace(self, base, old, new, marks)


def one_then_die(self: FencedSender, topic: str, records: Any) -> Any:
    """``FencedSender._send``, but only the first record of a batch is sent and committed before the process dies."""
    result = send(self, topic, records[:1])
    if len(records) > 1:
        die()
    return result


replace = StoreWriter._replace
send = FencedSender._send
assert all(map(callable, (Consumer._publish, Consumer._mark_published, Membership.tell_kafka)))  # what dies is there
#: Where it dies: name -> what arranges it.
POINTS: dict[str, Callable[[], None]] = {
    "claimed_but_nothing_else": lambda: setattr(StoreWriter, "claim", after(StoreWriter.claim, 1)),
    "files_written_but_not_committed": lambda: setattr(StoreWriter, "_replace", replaced_with_records),
    "committed_but_index_not": lambda: setattr(StoreWriter, "commit", after(StoreWriter.commit, 2)),
    "index_committed_but_refusals_not_published": lambda: setattr(Consumer, "_publish", die),
    "some_refusals_of_a_batch_published": lambda: setattr(FencedSender, "_send", one_then_die),
    "published_but_not_marked": lambda: setattr(Outbox, "publish", after(Outbox.publish, 1)),
    "published_but_kafka_not_told": lambda: setattr(Membership, "tell_kafka", die),
    "marking_published": lambda: setattr(Consumer, "_mark_published", die),
    "index_followed_but_not_committed": lambda: setattr(DuplicateIndex, "follow", after(DuplicateIndex.follow, 2)),
}


def run(settings: Settings, point: str) -> None:
    """Run until killed or asked to stop. ``point``: one of :data:`POINTS`, or ``never``."""
    if point != "never":
        POINTS[point]()
    run_ingest(settings)


def asleep_before(owner: type, name: str) -> None:
    """Stop before the first call of a method, and make the call once continued."""
    method: Callable[..., Any] = getattr(owner, name)
    slept: list[bool] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if not slept and (owner is not QuarantinePublisher or args[2]):  # it receives what to publish
            slept.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return method(*args, **kwargs)

    setattr(owner, name, call)


SLEEPS: dict[str, tuple[type, str]] = {
    "before_the_commit": (StoreWriter, "commit"),
    "between_commit_and_publish": (QuarantinePublisher, "publish"),
    "before_its_sender_is_open": (FencedSender, "open"),
    "between_reading_back_and_sending": (FencedSender, "send_all"),
    "with_its_ownership_checked": (FencedSender, "_send"),
}
"""Where it stops: before the first call of this method."""


def run_stopping(settings: Settings, point: str) -> None:
    """Run until asked to stop. ``point``: one of :data:`SLEEPS`."""
    asleep_before(*SLEEPS[point])
    run_ingest(settings)
