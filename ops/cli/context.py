"""The context of every command: settings, command lines of children, and a client of the server."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.errors import AccessError, BrokerError, ConfigError

if TYPE_CHECKING:  # modules of commands import what takes long inside of functions: `ratchet --help` loads them all
    from core.ledger import Ledger
    from core.settings import Settings
    from ratchet_client import Client
    from streams.store.sample_store import SampleStore

CONNECT_SECONDS = 3.0
SERVICES = frozenset({"up", "broker", "serve", "ingest", "maintain", "trainer", "console", "index"})

ServerOption = Annotated[
    str | None, typer.Option("--server", help="URL of the model server; server_url of the settings by default.")
]


@dataclass
class Context:
    file: Path | None
    flags: list[str]
    role: str = "ratchet"
    """Name of this process in the log: its command."""

    @cached_property
    def settings(self) -> Settings:
        """Load the settings and configure the log by them. Raises ConfigError."""
        from core.loading import load_settings
        from core.logs import configure_logging

        settings = load_settings(self.file, self.overrides)
        configure_logging(settings, self.role, service=self.role in SERVICES)
        return settings

    def calling(self, server: str | None) -> Settings:
        """The settings of a command that calls the server; ``server`` is its ``--server``. Raises ConfigError."""
        from core.loading import load_settings

        return self.settings if server is None else load_settings(self.file, {**self.overrides, "server_url": server})

    @property
    def overrides(self) -> dict[str, Any]:
        """Values of ``--set`` by dotted name. Raises ConfigError."""
        return dict(_assignment(flag) for flag in self.flags)

    def command(self, *words: str) -> list[str]:
        """The command line of a child ``ratchet`` process with the same settings."""
        from core.child_process import ratchet_command

        return ratchet_command(*words, file=self.file, flags=self.flags)


def of(context: typer.Context) -> Context:
    shared = context.find_object(Context)
    return shared if shared is not None else Context(None, [])


def installed(context: typer.Context) -> Settings:
    """The settings of a command that needs what others have made. Raises ConfigError if there is neither a ledger nor a
    sample store, as in a wrong folder."""
    settings = of(context).settings
    if not (settings.has_ledger or settings.has_store):
        raise _not_installed(settings)
    return settings


def ledger_of(context: typer.Context) -> Ledger:
    """The ledger of an installation. Raises ConfigError if there is none."""
    from core.ledger import Ledger

    settings = of(context).settings
    if not settings.has_ledger:
        raise _not_installed(settings)
    return Ledger.open(settings.ledger)


def store_of(context: typer.Context) -> SampleStore:
    """The sample store of an installation. Raises ConfigError if there is none."""
    from streams.store.sample_store import SampleStore

    return SampleStore(installed(context).lake)


def _not_installed(settings: Settings) -> ConfigError:
    return ConfigError(
        f"there is no installation at {settings.home.resolve()}: {settings.ledger} does not exist.",
        "Start one with `ratchet up` (`ratchet init` first, with a model of your own), or name its settings with "
        "--config FILE, or its folder with RATCHET_HOME.",
    )


def need_broker(settings: Settings) -> None:
    """Raises BrokerError unless a broker accepts connections: Kafka's client tries and logs on for many seconds."""
    from core.addresses import listens

    servers = settings.kafka.bootstrap
    if not any(listens(each.strip(), CONNECT_SECONDS) for each in servers.split(",")):
        raise BrokerError(
            f"no Kafka broker answers at {servers} (kafka.bootstrap).",
            "Start one (`ratchet up` does), or correct the address: --set kafka.bootstrap=HOST:PORT.",
        )


def person() -> str:
    """The system's name of the user, for the audit log, or ``operator`` if it cannot be recorded."""
    from core.access import OPERATOR

    try:
        return OPERATOR.actor(getpass.getuser())
    except (AccessError, KeyError, OSError):  # in a container the user may have no name, or that of a part
        return OPERATOR.name


def operator_client(settings: Settings, timeout: float = 60.0) -> Client:
    """A client of ``settings.server`` with the operators' key and the caller's name; ``timeout``: seconds per call.
    Raises ConfigError when ``server_url`` is set and there is no key: the server would not know one made here."""
    from ratchet_client import Client

    if settings.server_url is not None and not settings.has_operator_key:
        raise ConfigError(
            f"there is no operator key for {settings.server_url}.",
            "Set RATCHET_SERVE__OPERATOR_KEY to serving's serve.operator_key, or to a key with the scope operate.",
        )
    key = settings.operator_key().get_secret_value()
    return Client(settings.server, key, actor=person(), timeout=timeout, retries=0)


def _assignment(flag: str) -> tuple[str, Any]:
    from core.loading import parse_value

    name, equals, value = flag.partition("=")
    if not equals:
        raise ConfigError(
            f"--set {flag!r} is not an assignment.", "Write --set NAME=VALUE, e.g. --set serve.port=9000."
        )
    return name.strip(), parse_value(name.strip(), value)
