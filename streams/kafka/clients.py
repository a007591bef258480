"""Kafka clients from the settings, and queries about topics and rights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import ConfigResource, ConfigResourceType, NewTopic
from kafka.errors import (
    AuthorizationError,
    BrokerResponseError,
    KafkaError,
    LeaderNotAvailableError,
    NoError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)

from core.errors import BrokerError
from core.settings.streams import Ingest, Kafka
from ratchet_client.broker import CONNECT_SECONDS, MAX_RECORD_BYTES, Connection, client_options, explain
from ratchet_client.encoding import Encoded
from ratchet_client.producer import Delivery, Producer, RecordSender
from ratchet_client.records import Limits
from streams.kafka.oauth import oauth_options

log = logging.getLogger(__name__)
REQUEST_SECONDS = 10.0
SEND_SECONDS = 20.0
"""Longest wait for the acknowledgement of a single record."""
#: ``max.message.bytes`` of topics that Ratchet creates: the largest record plus quarantine's headers.
TOPIC_RECORD_BYTES = MAX_RECORD_BYTES + 1024 * 1024
#: Retention of a quarantine topic that Ratchet creates. The sample store has the records too, and deletions only reach
#: that.
QUARANTINE_SECONDS = 7 * 24 * 3600

Answer = TypeVar("Answer")


def connection(kafka: Kafka) -> Connection:
    """The client's connection for these settings. Raises ConfigError if ``kafka.oauth`` is incomplete."""
    return Connection(kafka.bootstrap, {**kafka.client, **oauth_options(kafka)})


def connect_producer(kafka: Kafka, limits: Ingest | None = None, **options: Any) -> Producer:
    to = connection(kafka)
    if limits is not None:
        options["limits"] = producer_limits(limits)
    return Producer(to.bootstrap, kafka.topic, options=to.options, **options)


def record_sender(kafka: Kafka) -> RecordSender:
    """A sender of encoded records, for :func:`deliver`. Raises BrokerError."""
    return RecordSender(connection(kafka), CONNECT_SECONDS, SEND_SECONDS)


def deliver(sender: RecordSender, topic: str, record: Encoded) -> Delivery:
    """Send one record, and wait for the broker's acknowledgement. Raises BrokerError."""
    try:
        return sender.send(topic, record).result(timeout=SEND_SECONDS + 5)
    except TimeoutError as error:
        raise BrokerError("the broker did not answer in time.", "Try again.") from error


def producer_limits(ingest: Ingest) -> Limits:
    return Limits(ingest.max_image_bytes, ingest.max_pixels, ingest.min_side)


@dataclass(frozen=True, slots=True)
class Topic:
    id: str
    """Empty if the broker has no topic IDs."""
    partitions: int
    replicas: int = 0


class Admin:
    """Queries about topics. One connection, made on first use and again after an error. Not thread safe."""

    def __init__(self, kafka: Kafka, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.kafka = kafka
        self.connect_seconds = connect_seconds
        self._client: KafkaAdminClient | None = None
        self._warned: set[str] = set()

    def topic(self, topic: str) -> Topic | None:
        """Describe a topic; None if it does not exist. Raises BrokerError if the broker cannot say, or denies it, which
        tells nothing of the topic."""
        description = self.ask(f"describing topic {topic}", partial(describe_topic, topic=topic))
        if description is None:
            return None
        partitions = description["partitions"]
        replicas = min((len(each["replica_nodes"]) for each in partitions), default=0)
        return Topic(str(description["topic_id"] or ""), len(partitions), replicas)

    def topic_id(self, topic: str) -> str | None:
        found = self.topic(topic)
        return None if found is None else found.id

    def ensure_topics(self, topics: Sequence[str], partitions: int = 1) -> None:
        """Create missing topics: for the largest records, with the broker's own replication factor. Retention is
        :data:`QUARANTINE_SECONDS` for the quarantine topic and unlimited for events, the record of what was released
        and deleted."""
        for topic in topics:
            if self.topic_id(topic) is None:
                configs = {"max.message.bytes": str(TOPIC_RECORD_BYTES)}
                if topic == self.kafka.quarantine_topic:
                    configs["retention.ms"] = str(QUARANTINE_SECONDS * 1000)
                elif topic == self.kafka.events_topic:
                    configs["retention.ms"] = "-1"
                self.ask("creating a topic", partial(_create, topic=topic, partitions=partitions, configs=configs))

    def warn_of_defaults(self, topic: str, partitions: int) -> None:
        """Log once which of a topic's settings were left at unsuitable Kafka defaults, as when a producer's first
        record created it. Does nothing if this user may not see the configuration. Raises BrokerError. ``partitions``:
        the fewest wanted."""
        if topic in self._warned or (found := self.topic(topic)) is None:
            return
        defaults = self.ask(f"describing the configuration of topic {topic}", partial(_defaults, topic=topic))
        self._warned.add(topic)
        size, wrong = defaults.get("max.message.bytes", TOPIC_RECORD_BYTES), []
        if size < TOPIC_RECORD_BYTES:
            wrong.append(f"takes records of at most {size:,} bytes (an image of 8 MiB is 11 MiB as base64)")
        if found.replicas > 2 and defaults.get("min.insync.replicas", 2) < 2:
            wrong.append(f"has {found.replicas} replicas and min.insync.replicas = 1: what one node alone has is sent")
        if found.partitions < partitions:
            wrong.append(f"has {found.partitions} partition(s), so as many processes can share it, not {partitions}")
        for each in wrong:
            log.warning("topic %s was left at Kafka's defaults and %s", topic, each)

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def ask(self, doing: str, question: Callable[[KafkaAdminClient], Answer]) -> Answer:
        """Call the client with ``question``; ``doing`` describes it in errors. Raises BrokerError if the broker is
        unreachable or denies access."""
        try:
            if self._client is None:
                options = client_options(connection(self.kafka), KafkaAdminClient.DEFAULT_CONFIG)
                bounds = {
                    "request_timeout_ms": int(REQUEST_SECONDS * 1000),
                    "bootstrap_timeout_ms": int(self.connect_seconds * 1000),
                    "reconnect_backoff_max_ms": 1000,
                }
                self._client = KafkaAdminClient(**{**bounds, **options})
            return question(self._client)
        except (KafkaError, OSError) as error:
            self.close()
            raise explain(error, connection(self.kafka), doing) from error


def describe_topic(client: KafkaAdminClient, topic: str) -> Mapping[str, Any] | None:
    """A topic's metadata; None if it does not exist. kafka-python does not raise the broker's error codes."""
    [description] = client.describe_topics([topic])
    match description["error_code"]:
        case NoError.errno | LeaderNotAvailableError.errno:  # the latter while leaders are elected
            return dict(description)
        case UnknownTopicOrPartitionError.errno:
            return None
        case code:
            raise for_code(code)(f"topic {topic}")


def _defaults(client: KafkaAdminClient, topic: str) -> dict[str, int]:
    """Numbers in a topic's configuration that were left at their defaults; empty if this user may not see them."""
    resource = ConfigResource(ConfigResourceType.TOPIC, topic)
    try:
        configs = client.describe_configs([resource], config_filter="default")["topic"][topic]
    except (KafkaError, KeyError):  # includes brokers without this request: it only serves a warning
        return {}
    names = ("max.message.bytes", "min.insync.replicas")
    return {name: int(configs[name]["value"]) for name in names if name in configs}


def _create(client: KafkaAdminClient, topic: str, partitions: int, configs: dict[str, str]) -> None:
    try:
        client.create_topics([NewTopic(topic, partitions, -1, topic_configs=configs)])
    except TopicAlreadyExistsError:
        return  # another process was faster
    except AuthorizationError as error:  # its own message is the whole request
        raise type(error)(f"Create on topic {topic} is missing") from error


def ensure_topics(kafka: Kafka, topics: Sequence[str], partitions: int = 1) -> None:
    with closing(Admin(kafka)) as admin:
        admin.ensure_topics(topics, partitions)


@contextmanager
def reading_alone(kafka: Kafka, doing: str, **options: Any) -> Iterator[Any]:
    """A :class:`kafka.KafkaConsumer` without a group; ``doing`` describes its use in errors. Raises BrokerError if the
    broker is unreachable or denies access."""
    known = client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)
    bounds = {"bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000), **known, **options, "group_id": None}
    consumer: Any = None
    try:
        consumer = KafkaConsumer(**bounds)
        yield consumer
    except (KafkaError, OSError) as error:
        raise explain(error, connection(kafka), doing) from error
    finally:
        if consumer is not None:
            consumer.close(timeout_ms=2000)


@dataclass(frozen=True, slots=True)
class Right:
    """Operations on a resource that Kafka's ACLs must allow."""

    operations: Sequence[str]
    kind: Literal["topic", "group", "transactional id"]
    name: str

    def __str__(self) -> str:
        return f"{'/'.join(self.operations)} on {self.kind} {self.name}{'*' if self.kind == 'transactional id' else ''}"


def ingest_rights(kafka: Kafka) -> list[Right]:
    return [
        Right(["Describe", "Read"], "topic", kafka.topic),
        Right(["Read"], "group", kafka.group),
        Right(["Describe", "Read", "Write"], "topic", kafka.quarantine_topic),
        Right(["Describe", "Write"], "transactional id", "ratchet-quarantine"),
    ]


def event_rights(kafka: Kafka) -> list[Right]:
    if not kafka.events_topic:
        return []
    return [
        Right(["Describe", "Read", "Write"], "topic", kafka.events_topic),
        Right(["Describe", "Write"], "transactional id", "ratchet-events"),
    ]


def check_rights(admin: Admin, needed: Collection[Right]) -> None:
    """Check the rights of the user in ``kafka.client``. What a broker does not tell counts as allowed. Raises
    BrokerError naming the missing ones, or if the broker does not answer."""
    missing = admin.ask("asking for its rights", lambda client: list(_missing(client, needed)))
    if missing:
        raise BrokerError(
            f"the broker {admin.kafka.bootstrap} does not allow {', '.join(map(str, missing))}.",
            "Add these ACLs for the user in `kafka.client` (docs/deployer/kafka.md, Rights).",
            "refused",
        )


def _missing(client: KafkaAdminClient, needed: Collection[Right]) -> Iterator[Right]:
    for right in needed:
        try:
            allowed = _allowed(client, right)
        except AuthorizationError:
            yield right
        except (BrokerResponseError, ValueError):
            continue  # no such group or ID, a broker that cannot be asked, or operations unknown to kafka-python
        else:
            lacking = [each for each in right.operations if allowed is not None and each.upper() not in allowed]
            if lacking:
                yield replace(right, operations=lacking)


def _allowed(client: KafkaAdminClient, right: Right) -> Collection[str] | None:
    """Operations allowed on a resource; None if unknown. Raises AuthorizationError if it may not even be described."""
    match right.kind:
        case "topic":
            found = describe_topic(client, right.name) or {}
        case "group":
            found = client.describe_groups([right.name])[right.name]
        case "transactional id":
            client.describe_transactions([f"{right.name}:"])  # implied by the right to write
            return None
    return found.get("authorized_operations") or None
