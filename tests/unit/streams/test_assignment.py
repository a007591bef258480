from __future__ import annotations

from typing import Any

import pytest
from kafka import TopicPartition

from streams.ingest.membership import Assignment, PartitionReader, new_generation, start_position
from streams.store.rows import Position
from streams.store.writer import Claim

ONE = Position("t", 0, 7, "id-1", 5)
LOGS = [ONE, Position("t", 1, 9, "id-1"), Position("t@1", 0, 2, "id-2")]


@pytest.mark.parametrize(
    ("known", "topic", "topic_id", "partition", "first", "expected"),
    [
        ([ONE], "t", "id-1", 0, 3, ONE),  # the same log
        ([ONE], "t", "id-2", 0, 0, Position("t@1", 0, 0, "id-2", 0)),  # a new one
        ([], "t", "id-1", 0, 3, Position("t", 0, 3, "id-1", 3)),
        ([ONE], "u", "id-1", 0, 0, Position("u", 0, 0, "id-1", 0)),
        ([ONE], "t", "", 0, 0, ONE),  # missing information of the broker is not a reason to start over
        ([Position("t", 0, 7, "", 5)], "t", "id-1", 0, 0, ONE),
        (LOGS, "t", "id-2", 1, 0, Position("t@1", 1, 0, "id-2", 0)),  # partitions of one new log share its generation
        (LOGS, "t", "id-2", 5, 0, Position("t@1", 5, 0, "id-2", 0)),
        (LOGS, "t", "id-3", 0, 0, Position("t@2", 0, 0, "id-3", 0)),
    ],
)
def test_a_known_log_is_read_on_and_an_unknown_one_from_its_beginning(
    known: list[Position], topic: str, topic_id: str, partition: int, first: int, expected: Position
) -> None:
    assert start_position(known, topic, topic_id, partition, first) == expected


def test_a_log_that_was_cut_short_is_a_new_generation_of_its_partition_from_the_divergence_on() -> None:
    known = [Position("t", 0, 7, "id-1"), Position("t", 1, 9, "id-1")]
    cut = new_generation(known, known[0], 4)
    assert (cut.stream, cut.partition, cut.next, cut.published, cut.topic_id) == ("t@1", 0, 4, 4, "id-1")
    later = [*known, Position("t@1", 0, 6, "id-1")]
    assert start_position(later, "t", "id-1", 0, 0).next == 6
    assert start_position(later, "t", "id-1", 1, 0).next == 9
    assert new_generation(later, later[2], 5).stream == "t@2"
    assert new_generation(later, known[1], 5).stream == "t@2", "no name is used twice"


class Seeks:
    """Records the calls of an assignment to a kafka-python consumer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._subscription = self

    def seek(self, partition: TopicPartition, offset: Any) -> None:
        self.calls.append(("seek", partition.partition, offset))

    def pause(self, *partitions: TopicPartition) -> None:
        self.calls += [("pause", each.partition) for each in partitions]

    def resume(self, *partitions: TopicPartition) -> None:
        self.calls += [("resume", each.partition) for each in partitions]


@pytest.fixture
def assignment() -> Assignment:
    return Assignment(Seeks(), "t")


def reading(partition: int, start: int = 0, epoch: int = -1) -> PartitionReader:
    return PartitionReader.of(Claim(Position("t", partition, start, leader_epoch=epoch), 1))


def test_nothing_is_fetched_of_a_partition_before_it_is_claimed(assignment: Assignment) -> None:
    assert not assignment.joined
    assignment.on_partitions_assigned([TopicPartition("t", 1), TopicPartition("t", 0)])
    assert assignment.joined and assignment.unclaimed() == [0, 1]
    assert ("pause", 0) in assignment.consumer.calls and ("resume", 0) not in assignment.consumer.calls
    assert assignment.begin(mine := reading(0, 7))
    assert assignment.consumer.calls[-2:] == [("seek", 0, 7), ("resume", 0)]
    assert (assignment.unclaimed(), assignment.all(), assignment.holds(mine)) == ([1], [mine], True)


def test_the_leader_epoch_goes_along_so_that_a_truncation_is_seen(assignment: Assignment) -> None:
    assignment.on_partitions_assigned([TopicPartition("t", 0)])
    assignment.begin(reading(0, 7, epoch=3))
    [*_, (_, _, with_epoch), resumed] = assignment.consumer.calls
    assert (with_epoch.offset, with_epoch.leader_epoch, resumed) == (7, 3, ("resume", 0))


def test_what_was_read_before_a_partition_came_back_does_not_hold(assignment: Assignment) -> None:
    partition = TopicPartition("t", 0)
    assignment.on_partitions_assigned([partition])
    assignment.begin(old := reading(0))
    assignment.on_partitions_revoked([partition])
    assert not assignment.joined and not assignment.holds(old) and not assignment.begin(old)
    assignment.on_partitions_assigned([partition])
    assert not assignment.holds(old) and assignment.unclaimed() == [0]
    assignment.begin(new := reading(0))
    assignment.give_up(old)
    assert assignment.holds(new), "an old reading gives up nothing of a new one"
    assignment.give_up(new)
    assert assignment.unclaimed() == [0] and assignment.consumer.calls[-1] == ("pause", 0)
    assignment.begin(new)
    assignment.on_partitions_lost([partition])
    assert assignment.all() == [] == assignment.unclaimed()
