"""An ingest that ends itself with SIGKILL at a chosen point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core.settings import Settings
from streams.ingest.consumer import Consumer, run_ingest
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.membership import Membership
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
    """``StoreWriter._replace``, but the process dies when the files of records are there and not yet committed."""
    if new:
        die()
    return replace(self, base, old, new, marks)


def one_then_die(self: FencedSender, topic: str, records: Any) -> Any:
    """``FencedSender._send``, but of a batch only the first record is sent and committed, and the process dies."""
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
