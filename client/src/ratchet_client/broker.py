"""Connecting a Kafka client, with errors in plain words."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import AuthorizationError, KafkaTimeoutError, SaslAuthenticationFailedError

from ratchet_client.errors import BrokerError, ConfigError

CONNECT_SECONDS: Final = 10.0
TLS_SECONDS: Final = 2.0
MAX_RECORD_BYTES: Final = 64 * 1024 * 1024
"""A base64 image of 8 MiB with its text, and room for larger limits. Brokers have a limit of their own (Apache Kafka:
1 MB unless ``message.max.bytes``, or ``max.message.bytes`` of the topic, is raised)."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Address of a broker, and credentials."""

    bootstrap: str
    """``host:port`` of one or more brokers, comma separated."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Options of kafka-python, mostly for TLS and SASL (``security_protocol``, ``ssl_cafile``, ``sasl_mechanism``,
    ``sasl_plain_username``, ``sasl_plain_password``, ``sasl_oauth_token_provider``). Numbers and booleans may be
    text."""


def client_options(connection: Connection, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a kafka-python client with these defaults: those of the connection that it knows, in their type.

    Raises:
        ConfigError: an option that no client knows, or one that is not of its type.
    """
    options: dict[str, Any] = {"bootstrap_servers": [each.strip() for each in connection.bootstrap.split(",")]}
    for name, value in connection.options.items():
        if name in defaults:
            options[name] = _typed(name, value, defaults[name])
        elif not any(name in kind.DEFAULT_CONFIG for kind in (KafkaConsumer, KafkaProducer, KafkaAdminClient)):
            raise ConfigError(
                f"{name} is not an option of kafka-python.",
                "Correct `options` (in a server's settings: `kafka.client`). See "
                "https://kafka-python.readthedocs.io/en/master/apidoc/KafkaConsumer.html.",
            )
    return options


def _typed(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value) if isinstance(default, (int, float)) else value
    except (KeyError, ValueError):
        kind = type(default).__name__
        raise ConfigError(
            f"the Kafka option {name} = {value!r} is not of type {kind}.", f"The default is {default!r}."
        ) from None


def explain(error: Exception, connection: Connection, doing: str) -> BrokerError:
    """A message that helps, for an error of a Kafka client."""
    what = f"{doing}: {type(error).__name__}: {error}".rstrip(": ")[:400]
    address = connection.bootstrap
    if problem := getattr(connection.options.get("sasl_oauth_token_provider"), "last_error", None):
        # kafka-python tries on until its own timeout, and tells of that alone
        words = f"there is no token for the broker {address}: {problem}."
        return BrokerError(words, "Check where tokens come from.", "refused")
    if isinstance(error, (SaslAuthenticationFailedError, AuthorizationError)):
        return BrokerError(f"the broker {address} refused {what}.", "Check user, password and ACLs.", "refused")
    if isinstance(error, KafkaTimeoutError) and "bootstrap" in str(error) and (problem := _tls_problem(connection)):
        return problem
    if isinstance(error, KafkaTimeoutError) and "sasl_mechanism" in connection.options:
        # kafka-python reports a wrong password as a timeout of the bootstrap
        return BrokerError(
            f"the broker {address} did not let us in ({what}).",
            "Is it running, and are user and password right?",
            "refused" if _listens(address) else "away",
        )
    return BrokerError(
        f"the broker {address} cannot be reached ({what}).",
        "Is one running there (`ratchet broker` starts one), and is the address (host:port) right?",
        "slow" if isinstance(error, KafkaTimeoutError) and _listens(address) else "away",
    )


def _tls_problem(connection: Connection) -> BrokerError | None:
    """The problem with TLS: kafka-python tells that to its log alone, and then of a timeout."""
    options = client_options(connection, KafkaConsumer.DEFAULT_CONFIG)
    if "SSL" not in options.get("security_protocol", ""):
        return None
    [address, *_] = options["bootstrap_servers"]
    host, _, port = address.rpartition(":")
    try:
        context = options.get("ssl_context") or ssl.create_default_context(cafile=options.get("ssl_cafile"))
        context.check_hostname = options.get("ssl_check_hostname", context.check_hostname)
        with socket.create_connection((host, int(port)), TLS_SECONDS) as plain:
            context.wrap_socket(plain, server_hostname=host).close()
    except ssl.SSLCertVerificationError as error:
        return BrokerError(
            f"the certificate of the broker {address} was refused ({error}).",
            "Set `ssl_cafile` to the certificate of the authority that issued it, and connect by a name that is in it.",
            "refused",
        )
    except ssl.SSLError as error:
        return BrokerError(
            f"there is no TLS connection to the broker {address} ({error}).",
            "Does this port speak TLS (`security_protocol`)?",
            "refused",
        )
    except (OSError, ValueError):
        pass  # it cannot be reached at all, or a file of the options cannot be read
    return None


def _listens(bootstrap: str) -> bool:
    """True where any of the servers accepts a connection."""
    for each in bootstrap.split(","):
        host, _, port = each.strip().rpartition(":")
        with suppress(OSError, ValueError, OverflowError), socket.create_connection((host, int(port)), timeout=1.0):
            return True
    return False
