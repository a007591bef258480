"""Making Kafka clients from the settings, and saying in plain words what is wrong when they cannot connect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from kafka.errors import (
    AuthorizationError,
    KafkaError,
    KafkaTimeoutError,
    SaslAuthenticationFailedError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)

from ops.errors import BrokerError, ConfigError
from ops.settings.streams import Kafka
from streams.oauth import oauth_options, token_provider

CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 10.0
#: A base64 image of 8 MiB with its text, and room for larger limits. Brokers have a limit of their own (Apache Kafka:
#: 1 MB unless ``message.max.bytes``, or ``max.message.bytes`` of the topic, is raised).
MAX_RECORD_BYTES = 64 * 1024 * 1024
#: ``max.message.bytes`` of topics that Ratchet makes: the largest record, and the headers that quarantine puts on it.
TOPIC_RECORD_BYTES = MAX_RECORD_BYTES + 1024 * 1024
#: How long a topic for refused records that Ratchet makes keeps them. The sample store has them as well, and deletions
#: reach only that.
REFUSALS_SECONDS = 7 * 24 * 3600


def client_options(kafka: Kafka, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a kafka-python client: bootstrap, tokens, and those of ``kafka.client`` that it knows, in their type.

    Raises:
        ConfigError: an option that no client knows, or one that is not of its type; or ``kafka.oauth`` is incomplete.
    """
    options: dict[str, Any] = {"bootstrap_servers": [each.strip() for each in kafka.bootstrap.split(",")]}
    for name, text in kafka.client.items():
        if name in defaults:
            options[name] = _typed(name, text, defaults[name])
        elif not any(name in kind.DEFAULT_CONFIG for kind in (KafkaConsumer, KafkaProducer, KafkaAdminClient)):
            raise ConfigError(
                f"kafka.client.{name} is no option of kafka-python.",
                "See https://kafka-python.readthedocs.io/en/master/apidoc/KafkaConsumer.html.",
            )
    return options | oauth_options(kafka)


def _typed(name: str, text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(default)(text) if isinstance(default, (int, float)) else text
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise ConfigError(f"kafka.client.{name} = {text!r} is no {kind}.", f"The default is {default!r}.") from None


def explain(error: Exception, kafka: Kafka, doing: str) -> BrokerError:
    """A message that helps, for an error of a Kafka client."""
    what = f"{doing}: {type(error).__name__}: {error}".rstrip(": ")[:400]
    if kafka.oauth.enabled and (problem := token_provider(kafka.oauth).last_error):
        # kafka-python tries on until its own timeout, and tells of that alone
        return BrokerError(f"there is no token for the broker {kafka.bootstrap}: {problem}.", "See docs/deployer.md.")
    if isinstance(error, (SaslAuthenticationFailedError, AuthorizationError)):
        return BrokerError(f"the broker {kafka.bootstrap} refused {what}.", "Check user, password and ACLs.")
    if isinstance(error, KafkaTimeoutError) and "sasl_mechanism" in kafka.client:
        # kafka-python reports a wrong password as a timeout of the bootstrap
        return BrokerError(
            f"the broker {kafka.bootstrap} did not let us in ({what}).",
            "Is it running, and are user and password in `kafka.client` right?",
        )
    return BrokerError(
        f"the broker {kafka.bootstrap} cannot be reached ({what}).",
        "Start one (`ratchet broker`), or set `kafka.bootstrap` (host:port).",
    )


class Admin:
    """Questions about topics. One connection, made at first use and again after an error. Not thread safe."""

    def __init__(self, kafka: Kafka, connect_seconds: float = CONNECT_SECONDS) -> None:
        self.kafka = kafka
        self.connect_seconds = connect_seconds
        self._client: KafkaAdminClient | None = None

    def topic_id(self, topic: str) -> str | None:
        """Kafka's id of a topic; empty where the broker has no ids, None when there is no such topic."""
        [description] = self._ask("describing topics", lambda client: client.describe_topics([topic]))
        if description["error_code"] == UnknownTopicOrPartitionError.errno:
            return None
        return str(description["topic_id"] or "")

    def ensure_topics(self, topics: Sequence[str], partitions: int = 1) -> None:
        """Create the topics that are not there: for the largest records, with the broker's own replication factor.

        That for refused records keeps them for :data:`REFUSALS_SECONDS`.
        """
        for topic in topics:
            if self.topic_id(topic) is None:
                configs = {"max.message.bytes": str(TOPIC_RECORD_BYTES)}
                if topic == self.kafka.quarantine_topic:
                    configs["retention.ms"] = str(REFUSALS_SECONDS * 1000)
                self._ask("creating a topic", partial(_create, topic=topic, partitions=partitions, configs=configs))

    def close(self) -> None:
        """Give up the connection."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _ask(self, doing: str, question: Any) -> Any:
        try:
            if self._client is None:
                options = client_options(self.kafka, KafkaAdminClient.DEFAULT_CONFIG)
                bounds = {
                    "request_timeout_ms": int(REQUEST_SECONDS * 1000),
                    "bootstrap_timeout_ms": int(self.connect_seconds * 1000),
                    "reconnect_backoff_max_ms": 1000,
                }
                self._client = KafkaAdminClient(**{**bounds, **options})
            return question(self._client)
        except (KafkaError, OSError) as error:
            self.close()
            raise explain(error, self.kafka, doing) from error


def _create(client: KafkaAdminClient, topic: str, partitions: int, configs: dict[str, str]) -> None:
    try:
        client.create_topics([NewTopic(topic, partitions, -1, topic_configs=configs)])
    except TopicAlreadyExistsError:
        return  # another process was faster


def ensure_topics(kafka: Kafka, topics: Sequence[str], partitions: int = 1) -> None:
    """Create the topics that are not there. Raises BrokerError."""
    admin = Admin(kafka)
    try:
        admin.ensure_topics(topics, partitions)
    finally:
        admin.close()
