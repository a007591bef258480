"""Rights on Kafka that are missing are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from kafka.errors import (
    GroupAuthorizationFailedError,
    GroupIdNotFoundError,
    NoError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailedError,
    TransactionalIdNotFoundError,
    UnknownTopicOrPartitionError,
)

from core.errors import BrokerError
from core.settings.streams import Kafka
from streams.kafka.clients import Admin, check_rights, event_rights, ingest_rights


class Client:
    """Answers as kafka-python's admin client: what a user may do with each topic and group."""

    def __init__(self, topics: dict[str, list[str] | None], groups: list[str] | None, ids: bool) -> None:
        self.topics, self.groups, self.ids = topics, groups, ids

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        def one(name: str) -> dict[str, Any]:
            if name not in self.topics:
                return {"error_code": UnknownTopicOrPartitionError.errno, "authorized_operations": None}
            allowed = self.topics[name]
            code = TopicAuthorizationFailedError.errno if allowed == [] else NoError.errno
            return {"error_code": code, "authorized_operations": allowed}

        return [one(name) for name in names]

    def describe_groups(self, names: list[str]) -> dict[str, dict[str, Any]]:
        if self.groups == []:
            raise GroupAuthorizationFailedError(names[0])
        if self.groups is None:
            raise GroupIdNotFoundError(names[0])
        return {name: {"authorized_operations": self.groups} for name in names}

    def describe_transactions(self, ids: list[str]) -> None:
        raise (TransactionalIdNotFoundError if self.ids else TransactionalIdAuthorizationFailedError)(ids[0])


class AdminOf(Admin):
    """Asks such a client."""

    def __init__(self, client: Client) -> None:
        super().__init__(Kafka(bootstrap="kafka:9092"))
        self.client = client

    def ask(self, doing: str, question: Callable[[Any], Any]) -> Any:
        return question(self.client)


EVERY = ["DESCRIBE", "READ", "WRITE"]


def test_all_that_is_missing_is_named_at_once() -> None:
    nothing = Client({"ratchet.samples": [], "ratchet.quarantine": ["DESCRIBE"], "ratchet.events": []}, [], False)
    with pytest.raises(BrokerError) as caught:
        check_rights(AdminOf(nothing), ingest_rights(Kafka()))
    assert caught.value.state == "refused"
    assert caught.value.message == (
        "the broker kafka:9092 does not allow Describe/Read on topic ratchet.samples, Read on group ratchet-ingest,"
        " Read/Write on topic ratchet.quarantine, Describe/Write on transactional id ratchet-quarantine*."
    )
    with pytest.raises(
        BrokerError, match=r"Read/Write on topic ratchet.events, Describe/Write on trans.* ratchet-events"
    ):
        check_rights(AdminOf(nothing), event_rights(Kafka()))


@pytest.mark.parametrize(
    "client",
    [
        Client({"ratchet.samples": ["DESCRIBE", "READ"], "ratchet.quarantine": EVERY}, ["READ", "DESCRIBE"], True),
        Client({}, None, True),  # nothing is there yet
        Client({"ratchet.samples": None, "ratchet.quarantine": None}, None, True),  # no authorizer
    ],
)
def test_who_has_the_rights_or_is_not_told_of_them_lacks_none(client: Client) -> None:
    check_rights(AdminOf(client), ingest_rights(Kafka()))


def test_without_a_topic_for_events_no_rights_are_needed_for_it() -> None:
    assert event_rights(Kafka(events_topic="")) == []
