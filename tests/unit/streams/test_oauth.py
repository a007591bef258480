from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import KafkaConnectionError, KafkaTimeoutError, SaslAuthenticationFailedError
from kafka.net.sasl.oauth import SaslMechanismOAuth

from core.addresses import free_port
from core.errors import ConfigError
from core.loading import load_settings
from core.settings.identity import OAuth
from core.settings.streams import Kafka
from ratchet_client.broker import client_options, explain
from streams.kafka import oauth as module
from streams.kafka.clients import connection
from streams.kafka.oauth import TokenProvider, token_provider
from tests.support.web_server import web_server


class TokenServer:
    """A token endpoint: each token is new, unless another answer is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        self.life: Any = 3600
        self.answer: tuple[int, bytes] | None = None
        self.url = ""

    def reply(self, authorization: str, form: str) -> tuple[int, bytes]:
        self.asked.append((authorization, parse_qs(form)))
        token = {"access_token": f"token-{len(self.asked)}", "token_type": "Bearer", "expires_in": self.life}
        return self.answer or (200, json.dumps(token).encode())


@pytest.fixture
def server() -> Iterator[TokenServer]:
    tokens = TokenServer()

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

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tokens.url = f"http://127.0.0.1:{http.server_port}/token"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    yield tokens
    http.shutdown()
    thread.join(60)
    http.server_close()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def oauth(server: TokenServer, **more: Any) -> OAuth:
    return OAuth(token_url=server.url, client_id="rat", client_secret="hu:sh&", **more)


def test_a_token_is_asked_for_with_the_client_credentials(server: TokenServer) -> None:
    assert TokenProvider(oauth(server, scope="kafka read")).token() == "token-1"
    [(authorization, form)] = server.asked
    assert base64.b64decode(authorization.removeprefix("Basic ")) == b"rat:hu%3Ash%26"  # RFC 6749, 2.3.1
    assert form == {"grant_type": ["client_credentials"], "scope": ["kafka read"]}


def test_what_kafka_python_sends_is_the_token_with_its_extensions(server: TokenServer) -> None:
    kafka = Kafka(oauth=oauth(server, extensions={"logicalCluster": "lkc-1"}))
    for client in (KafkaConsumer, KafkaProducer, KafkaAdminClient):
        options = client_options(connection(kafka), client.DEFAULT_CONFIG)
        assert (options["sasl_mechanism"], options["security_protocol"]) == ("OAUTHBEARER", "SASL_SSL")
        sent = SaslMechanismOAuth(**options).auth_bytes()
        assert sent == b"n,,\x01auth=Bearer token-1\x01logicalCluster=lkc-1\x01\x01"
    assert len(server.asked) == 1  # the three share it


def test_a_token_is_renewed_before_it_ends(server: TokenServer, clock: Clock) -> None:
    provider = TokenProvider(oauth(server))
    assert provider.token() == "token-1"
    clock.now += 0.79 * 3600
    assert provider.token() == "token-1"
    clock.now += 0.02 * 3600
    assert provider.token() == "token-2"


def test_the_old_token_is_used_to_its_end_while_the_endpoint_is_away(server: TokenServer, clock: Clock) -> None:
    provider = TokenProvider(oauth(server))
    provider.token()
    server.answer = (503, b"")
    clock.now += 0.9 * 3600
    assert provider.token() == "token-1"
    clock.now += 0.2 * 3600
    with pytest.raises(KafkaConnectionError, match=r"kafka\.oauth\.token_url"):
        provider.token()
    server.answer = None
    assert provider.token().startswith("token-") and provider.last_error is None


@pytest.mark.parametrize(
    ("answer", "error", "named"),
    [
        ((401, b'{"error": "invalid_client"}'), SaslAuthenticationFailedError, "invalid_client.*client_secret"),
        ((400, b"no json"), SaslAuthenticationFailedError, "kafka.oauth.client_id"),
        ((400, b'{"error": "invalid_scope"}'), SaslAuthenticationFailedError, "kafka.oauth.scope"),
        ((500, b""), KafkaConnectionError, "status 500"),
        ((429, b""), KafkaConnectionError, "status 429"),
        ((302, b""), KafkaConnectionError, "status 302"),
        ((200, b"{}"), KafkaConnectionError, "no token"),
        ((200, b"[" * 100_000), KafkaConnectionError, "no token"),
        ((200, b'{"access_token": 7}'), KafkaConnectionError, "no token"),
        ((200, b'{"access_token": "a\\u0001b=c"}'), KafkaConnectionError, "visible ASCII"),
        ((200, b" " * 300_000), KafkaConnectionError, "kafka.oauth.token_url .* more than 262144 bytes"),
    ],
)
def test_an_endpoint_that_refuses_or_answers_nonsense_is_told_by_the_setting(
    server: TokenServer, answer: tuple[int, bytes], error: type[Exception], named: str
) -> None:
    server.answer = answer
    kafka = Kafka(oauth=oauth(server))
    with pytest.raises(error, match=named) as caught:
        token_provider(kafka.oauth).token()
    shown = explain(
        KafkaTimeoutError("Unable to bootstrap"), connection(kafka), "connecting"
    )  # what kafka-python makes of it
    assert "token" in str(shown) and str(caught.value.args[0]) in str(shown)
    assert "hu:sh" not in str(shown) + repr(kafka) + str(caught.value)


@pytest.mark.parametrize("chunk", [b" ", b" " * 65_536])
def test_an_endpoint_that_never_ends_its_answer_is_left(chunk: bytes) -> None:
    with web_server() as web:
        web.pages["/token"] = web.endless(chunk, 0.02)
        settings = OAuth(token_url=f"http://{web.host}:{web.port}/token", client_id="rat", client_secret="hush")
        with pytest.raises(KafkaConnectionError, match=r"kafka\.oauth\.token_url"):
            TokenProvider(settings, timeout_seconds=0.5).token()
        assert web.hung_up.wait(20)


def test_an_endpoint_that_is_not_there_is_told_by_the_setting() -> None:
    gone = OAuth(token_url=f"http://127.0.0.1:{free_port()}/", client_id="a", client_secret="b")  # type: ignore[arg-type]
    with pytest.raises(KafkaConnectionError, match=r"kafka\.oauth\.token_url"):
        TokenProvider(gone).token()


def test_a_token_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    provider = TokenProvider(OAuth(token_file=file))
    with pytest.raises(KafkaConnectionError, match=r"kafka\.oauth\.token_file"):
        provider.token()
    for token in ("one", "two"):
        file.write_text(f"{token}\n")
        assert provider.token() == token
    for wrong in (b"", b"two words", b"\xff\xfe", b"x" * (module.MAX_TOKEN_CHARS + 1)):
        file.write_bytes(wrong)
        with pytest.raises(SaslAuthenticationFailedError, match=r"kafka\.oauth\.token_file"):
            provider.token()


@pytest.mark.parametrize(
    ("kafka", "named"),
    [
        ({"client": {"sasl_mechanism": "OAUTHBEARER"}}, "token_url"),
        ({"oauth": {"token_url": "https://a.example/"}}, "client_id"),
        ({"oauth": {"token_url": "https://a.example/", "client_id": "a"}}, "client_secret"),
        ({"oauth": {"token_file": "/t"}, "client": {"sasl_mechanism": "PLAIN"}}, "PLAIN"),
        ({"oauth": {"token_file": "/t"}, "client": {"security_protocol": "SSL"}}, "security_protocol"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(kafka: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        client_options(connection(Kafka(**kafka)), KafkaConsumer.DEFAULT_CONFIG)


def test_a_protocol_without_tls_is_taken_where_it_is_asked_for() -> None:
    kafka = Kafka(oauth=OAuth(token_file=Path("/t")), client={"security_protocol": "SASL_PLAINTEXT"})
    assert client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)["security_protocol"] == "SASL_PLAINTEXT"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kafka.oauth.token_url", "ftp://u:hush@a.example/"),
        ("kafka.oauth.token_url", "https://u:hush@a.example/"),
        ("kafka.schema_registry", "https://u:hush@a.example/"),
        ("kafka.schema_registry_auth", "hush"),
        ("kafka.oauth.client_secret", ["hush"]),
        ("kafka.client", "hush"),
        ("ledger_url", ["hush"]),
        ("kafka.oauth.extensions", {"auth": "hush"}),
    ],
)
def test_a_wrong_value_that_may_hold_a_secret_is_not_shown(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides={setting: value}, environ={})
    assert setting.removesuffix(".extensions") in str(caught.value) and "hush" not in str(caught.value)
