"""Bearer tokens for SASL OAUTHBEARER, from the settings ``kafka.oauth``.

They come from a token endpoint by the client-credentials grant (RFC 6749, 4.4; ID and secret by HTTP Basic, as Kafka's
Java client sends them), or from a file that another program refreshes, such as a projected service account token.
kafka-python requests a token on its own thread whenever it connects or reauthenticates (KIP-368). A token is renewed
after four fifths of its life; while the endpoint is unreachable, the old one is used to its end.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from typing import Any, Final
from urllib.parse import quote_plus

import httpx
from kafka.errors import KafkaConnectionError, KafkaError, SaslAuthenticationFailedError
from kafka.net.sasl.oauth import AbstractTokenProvider

from core.errors import ConfigError
from core.settings.identity import OAuth
from core.settings.streams import Kafka
from streams.records.http_body import UNCOMPRESSED, BodyTooLarge, bounded_body

log = logging.getLogger(__name__)
TIMEOUT_SECONDS: Final = 5.0
"""kafka-python sends no heartbeats while it waits for a token; a session lasts 45 s."""
MAX_RESPONSE_BYTES: Final = 256 * 1024
_JSON: Final = {"accept": "application/json", **UNCOMPRESSED}
MAX_TOKEN_CHARS: Final = 64 * 1024
REFRESH_AT: Final = 0.8
DEFAULT_LIFE_SECONDS: Final = 300.0


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Provides tokens to kafka-python. Thread safe; one instance serves all clients of a process."""

    def __init__(self, oauth: OAuth, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        super().__init__()
        if oauth.token_url and not (oauth.client_id and oauth.client_secret):
            missing = "client_secret" if oauth.client_id else "client_id"
            raise ConfigError(f"kafka.oauth.{missing} is not set.", "kafka.oauth.token_url needs id and secret.")
        if not oauth.enabled:
            raise ConfigError("no source of tokens is set.", "Set kafka.oauth.token_url or kafka.oauth.token_file.")
        self.oauth = oauth
        self.last_error: str | None = None
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._token = ""
        self._refresh_at = self._ends_at = 0.0

    def token(self) -> str:
        """A currently valid token. The errors name the setting: SaslAuthenticationFailedError if the endpoint denies
        access, or the file has no token; KafkaConnectionError if the endpoint is unreachable."""
        with self._lock:
            try:
                token = self._from_file() if self.oauth.token_file else self._from_endpoint()
            except KafkaError as error:
                self.last_error = str(error.args[0])
                raise
            self.last_error = None
            return token

    def extensions(self) -> dict[str, str]:
        return dict(self.oauth.extensions)

    def _from_file(self) -> str:
        path = self.oauth.token_file
        assert path is not None
        try:
            with path.open("rb") as file:
                return _checked(file.read(MAX_TOKEN_CHARS + 1).decode("ascii", "replace").strip())
        except OSError as error:
            raise KafkaConnectionError(f"kafka.oauth.token_file cannot be read: {error}") from None
        except ValueError as error:
            raise SaslAuthenticationFailedError(f"kafka.oauth.token_file {path} {error}") from None

    def _from_endpoint(self) -> str:
        now = time.monotonic()
        if now < self._refresh_at:
            return self._token
        try:
            self._token, life = self._ask()
        except KafkaError as error:
            if now + self._timeout_seconds < self._ends_at:
                log.warning("a token is used for longer, for there is no new one: %s", error)
                return self._token
            raise
        self._refresh_at, self._ends_at = now + REFRESH_AT * life, now + life
        return self._token

    def _ask(self) -> tuple[str, float]:
        secret = self.oauth.client_secret
        assert secret is not None
        form = {"grant_type": "client_credentials", **({"scope": self.oauth.scope} if self.oauth.scope else {})}
        auth = httpx.BasicAuth(quote_plus(self.oauth.client_id), quote_plus(secret.get_secret_value()))
        try:
            with httpx.stream(
                "POST", self.oauth.token_url, data=form, auth=auth, headers=_JSON, timeout=self._timeout_seconds
            ) as response:
                status = response.status_code
                body = bounded_body(response, MAX_RESPONSE_BYTES, self._timeout_seconds)
        except BodyTooLarge as error:
            raise KafkaConnectionError(f"kafka.oauth.token_url {self.oauth.token_url} answers with {error}") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise KafkaConnectionError(
                f"kafka.oauth.token_url {self.oauth.token_url} does not answer ({type(error).__name__})"
            ) from None
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        answer = answer if isinstance(answer, dict) else {}
        if 400 <= status < 500 and status != 429:
            code = str(answer.get("error", ""))[:80]
            raise SaslAuthenticationFailedError(
                f"the token endpoint {self.oauth.token_url} refuses (status {status} {code!r}): check "
                "kafka.oauth.client_id, kafka.oauth.client_secret and kafka.oauth.scope"
            )
        try:
            if status != 200:
                raise ValueError(f"answers with status {status}")
            life = float(answer.get("expires_in") or DEFAULT_LIFE_SECONDS)
            return _checked(answer.get("access_token")), life if 0 < life < 1e9 else DEFAULT_LIFE_SECONDS
        except (ValueError, TypeError, OverflowError) as error:
            raise KafkaConnectionError(f"kafka.oauth.token_url {self.oauth.token_url} {error}") from None


def _checked(token: object) -> str:
    """Validate a token by RFC 6750: it is placed between control characters in the SASL message."""
    if not isinstance(token, str) or not token:
        raise ValueError("gives no token")
    if len(token) > MAX_TOKEN_CHARS or not all("!" <= char <= "~" for char in token):
        raise ValueError("gives a token that is too long, or holds other characters than visible ASCII")
    return token


def token_provider(oauth: OAuth) -> TokenProvider:
    """The provider of these settings, shared by all clients. Raises ConfigError."""
    secret = oauth.client_secret.get_secret_value() if oauth.client_secret else ""
    key = oauth.model_dump_json(exclude={"client_secret"}), secret
    with _sharing:
        return _shared.get(key) or _shared.setdefault(key, TokenProvider(oauth))


_shared: dict[tuple[str, str], TokenProvider] = {}
_sharing = threading.Lock()


def oauth_options(kafka: Kafka) -> dict[str, Any]:
    """kafka-python client options for ``kafka.oauth``; empty if it is not set. Raises ConfigError: ``kafka.client``
    sets another mechanism, or OAUTHBEARER without a source of tokens."""
    mechanism = kafka.client.get("sasl_mechanism")
    if not kafka.oauth.enabled:
        if mechanism == "OAUTHBEARER":
            raise ConfigError(
                "kafka.client.sasl_mechanism is OAUTHBEARER, and no source of tokens is set.",
                "Set kafka.oauth.token_url (with client_id and client_secret) or kafka.oauth.token_file.",
            )
        return {}
    if mechanism not in (None, "OAUTHBEARER"):
        raise ConfigError(f"kafka.oauth is set, and kafka.client.sasl_mechanism is {mechanism!r}.", "Keep one of them.")
    protocol = kafka.client.get("security_protocol", "SASL_SSL")
    if protocol not in ("SASL_SSL", "SASL_PLAINTEXT"):
        raise ConfigError(f"kafka.client.security_protocol {protocol!r} sends no token.", "Use SASL_SSL.")
    return {
        "security_protocol": protocol,
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauth_token_provider": token_provider(kafka.oauth),
    }
