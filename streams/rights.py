"""The rights on Kafka that ingest and maintenance need, and which of them are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from kafka import KafkaAdminClient
from kafka.errors import AuthorizationError, BrokerResponseError

from core.errors import BrokerError
from core.settings.streams import Kafka
from streams.clients import Admin, describe_topic


@dataclass(frozen=True, slots=True)
class Right:
    """Operations that ACLs of Kafka allow on one resource."""

    operations: Sequence[str]
    kind: Literal["topic", "group", "transactional id"]
    name: str
    """Of a transactional id: the prefix of those that are used."""

    def __str__(self) -> str:
        return f"{'/'.join(self.operations)} on {self.kind} {self.name}{'*' if self.kind == 'transactional id' else ''}"


def ingest_rights(kafka: Kafka) -> list[Right]:
    """Those of `ratchet ingest`."""
    return [
        Right(["Describe", "Read"], "topic", kafka.topic),
        Right(["Read"], "group", kafka.group),
        Right(["Describe", "Read", "Write"], "topic", kafka.quarantine_topic),
        Right(["Describe", "Write"], "transactional id", "ratchet-quarantine"),
    ]


def event_rights(kafka: Kafka) -> list[Right]:
    """Those of `ratchet maintain`, which publishes events."""
    if not kafka.events_topic:
        return []
    return [
        Right(["Describe", "Read", "Write"], "topic", kafka.events_topic),
        Right(["Describe", "Write"], "transactional id", "ratchet-events"),
    ]


def check_rights(admin: Admin, needed: Collection[Right]) -> None:
    """Make sure that the user in ``kafka.client`` has some rights. What a broker does not tell counts as allowed.

    Raises:
        BrokerError: some are missing, which it names; or the broker does not answer.
    """
    missing = admin.ask("asking for its rights", lambda client: list(_missing(client, needed)))
    if missing:
        raise BrokerError(
            f"the broker {admin.kafka.bootstrap} does not allow {', '.join(map(str, missing))}.",
            "Add these ACLs for the user in `kafka.client` (docs/deployer.md, Kafka).",
            "refused",
        )


def _missing(client: KafkaAdminClient, needed: Collection[Right]) -> Iterator[Right]:
    for right in needed:
        try:
            allowed = _ALLOWED[right.kind](client, right.name)
        except AuthorizationError:
            yield right
        except (BrokerResponseError, ValueError):
            continue  # no such group or id, a broker that cannot be asked, operations that kafka-python does not know
        else:
            lacking = [each for each in right.operations if allowed is not None and each.upper() not in allowed]
            if lacking:
                yield replace(right, operations=lacking)


def _topic(client: KafkaAdminClient, name: str) -> Collection[str] | None:
    return _operations(describe_topic(client, name) or {})


def _group(client: KafkaAdminClient, name: str) -> Collection[str] | None:
    return _operations(client.describe_groups([name])[name])


def _transactional_id(client: KafkaAdminClient, name: str) -> None:
    client.describe_transactions([f"{name}:"])  # which writing includes


def _operations(found: Mapping[str, Any]) -> Collection[str] | None:
    return found.get("authorized_operations") or None


_ALLOWED: Final = {"topic": _topic, "group": _group, "transactional id": _transactional_id}
"""Operations that are allowed on each kind of resource; None where that cannot be told.

Raises AuthorizationError where it may not even be described."""
