"""The context of every command: settings, the command line of a child under the same ones, a client of the server."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from core.access import OPERATOR
from core.child_process import ratchet_command
from core.errors import AccessError, ConfigError
from core.ledger import Ledger
from core.loading import load_settings, parse_value
from core.logs import configure_logging
from core.settings import Settings

if TYPE_CHECKING:
    from ratchet_client import Client

SERVICES = frozenset({"up", "broker", "serve", "ingest", "maintain", "trainer", "console"})
"""Commands that run until they are stopped."""

ServerOption = Annotated[
    str | None, typer.Option("--server", help="URL of the model server; server_url of the settings by default.")
]


@dataclass
class Context:
    """The global flags."""

    file: Path | None
    flags: list[str]
    role: str = "ratchet"
    """The name of this process in the log: that of the command."""

    @cached_property
    def settings(self) -> Settings:
        """The settings; from now on the log is as they say. Raises ConfigError."""
        settings = load_settings(self.file, self.overrides)
        configure_logging(settings, self.role, service=self.role in SERVICES)
        return settings

    def calling(self, server: str | None) -> Settings:
        """The settings of a command that calls the model server; ``server`` is its ``--server``. Raises ConfigError."""
        return self.settings if server is None else load_settings(self.file, {**self.overrides, "server_url": server})

    @property
    def overrides(self) -> dict[str, Any]:
        """The values of ``--set``, by dotted name. Raises ConfigError."""
        return dict(_assignment(flag) for flag in self.flags)

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``ratchet`` with ``words`` in a child, under the same settings."""
        return ratchet_command(*words, file=self.file, flags=self.flags)


def of(context: typer.Context) -> Context:
    """The :class:`Context` of a typer command."""
    shared = context.find_object(Context)
    return shared if shared is not None else Context(None, [])


def ledger_of(context: typer.Context) -> Ledger:
    """The ledger that the settings name. Raises ConfigError, LedgerError."""
    return Ledger.open(of(context).settings.ledger)


def person() -> str:
    """The user who runs this command, for the audit log: the system's name for them, if it can be recorded."""
    try:
        return OPERATOR.actor(getpass.getuser())
    except (AccessError, KeyError, OSError):  # in a container the user may have no name, or that of a part
        return OPERATOR.name


def operator_client(settings: Settings, timeout: float = 60.0) -> Client:
    """A client of the server at ``settings.server``, with the operators' key and the caller's name.

    Args:
        timeout: seconds of one call.

    Raises:
        ConfigError: the server is another machine's, and this one has no key for it. The server would not know a key
            that is made here.
    """
    from ratchet_client import Client

    if settings.server_url is not None and not settings.has_operator_key:
        raise ConfigError(
            f"there is no operator key for {settings.server_url}.",
            "Set RATCHET_SERVE__OPERATOR_KEY to serving's serve.operator_key, or to a key with the scope operate.",
        )
    key = settings.operator_key().get_secret_value()
    return Client(settings.server, key, actor=person(), timeout=timeout, retries=0)


def _assignment(flag: str) -> tuple[str, Any]:
    name, equals, value = flag.partition("=")
    if not equals:
        raise ConfigError(
            f"--set {flag!r} is not an assignment.", "Write --set NAME=VALUE, e.g. --set serve.port=9000."
        )
    return name.strip(), parse_value(name.strip(), value)
