"""Kafka clients from the settings: what the client package wants to know, and questions about topics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from kafka import KafkaAdminClient
from kafka.admin import NewTopic
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    LeaderNotAvailableError,
    NoError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)

from ops.settings.streams import Ingest, Kafka
from ratchet_client.broker import CONNECT_SECONDS, MAX_RECORD_BYTES, Connection, client_options, explain
from ratchet_client.limits import Limits
from ratchet_client.producer import Producer
from streams.oauth import oauth_options

REQUEST_SECONDS = 10.0
#: ``max.message.bytes`` of topics that Ratchet makes: the largest record, and the headers that quarantine puts on it.
TOPIC_RECORD_BYTES = MAX_RECORD_BYTES + 1024 * 1024
#: How long a topic for refused records that Ratchet makes keeps them. The sample store has them as well, and deletions
#: reach only that.
REFUSALS_SECONDS = 7 * 24 * 3600

Answer = TypeVar("Answer")


def connection(kafka: Kafka) -> Connection:
    """The client's connection that these settings stand for. Raises ConfigError where ``kafka.oauth`` is incomplete."""
    return Connection(kafka.bootstrap, {**kafka.client, **oauth_options(kafka)})


def connect_producer(kafka: Kafka, limits: Ingest | None = None, **options: Any) -> Producer:
    """The client's producer of these settings; ``options`` are further ones of it. Raises as it does."""
    to = connection(kafka)
    if limits is not None:
        options["limits"] = producer_limits(limits)
    return Producer(to.bootstrap, kafka.topic, options=to.options, **options)


def producer_limits(ingest: Ingest) -> Limits:
    """What these settings demand of a sample."""
    return Limits(ingest.max_image_bytes, ingest.max_pixels, ingest.min_side, ingest.max_text_chars)


class Admin:
    """Questions about topics. One connection, made at first use and again after an error. Not thread safe."""

    def __init__(self, kafka: Kafka, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.kafka = kafka
        self.connect_seconds = connect_seconds
        self._client: KafkaAdminClient | None = None

    def topic_id(self, topic: str) -> str | None:
        """Kafka's id of a topic; empty where the broker has no ids, None when there is no such topic.

        Raises:
            BrokerError: the broker cannot say, or this user may not ask, which tells nothing of the topic.
        """
        description = self.ask(f"describing topic {topic}", partial(describe_topic, topic=topic))
        return None if description is None else str(description["topic_id"] or "")

    def ensure_topics(self, topics: Sequence[str], partitions: int = 1) -> None:
        """Create the topics that are not there: for the largest records, with the broker's own replication factor.

        That for refused records keeps them for :data:`REFUSALS_SECONDS`.
        """
        for topic in topics:
            if self.topic_id(topic) is None:
                configs = {"max.message.bytes": str(TOPIC_RECORD_BYTES)}
                if topic == self.kafka.quarantine_topic:
                    configs["retention.ms"] = str(REFUSALS_SECONDS * 1000)
                self.ask("creating a topic", partial(_create, topic=topic, partitions=partitions, configs=configs))

    def close(self) -> None:
        """Give up the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def ask(self, doing: str, question: Callable[[KafkaAdminClient], Answer]) -> Answer:
        """What a question to the client returns. ``doing`` names it in the error.

        Raises:
            BrokerError: the broker is away, or refuses.
        """
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
    """A topic's metadata; None when there is no such topic. kafka-python does not raise what the broker answers."""
    [description] = client.describe_topics([topic])
    match description["error_code"]:
        case NoError.errno | LeaderNotAvailableError.errno:  # the latter while leaders are elected
            return dict(description)
        case UnknownTopicOrPartitionError.errno:
            return None
        case code:
            raise for_code(code)(f"topic {topic}")


def _create(client: KafkaAdminClient, topic: str, partitions: int, configs: dict[str, str]) -> None:
    try:
        client.create_topics([NewTopic(topic, partitions, -1, topic_configs=configs)])
    except TopicAlreadyExistsError:
        return  # another process was faster
    except AuthorizationError as error:  # its own words are the whole request
        raise type(error)(f"Create on topic {topic} is missing") from error


def ensure_topics(kafka: Kafka, topics: Sequence[str], partitions: int = 1) -> None:
    """Create the topics that are not there. Raises BrokerError."""
    admin = Admin(kafka)
    try:
        admin.ensure_topics(topics, partitions)
    finally:
        admin.close()
