"""What every command shares: the settings, read when first asked for, and how to pass them on to a child process."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

from core.access import OPERATOR
from core.child_process import ratchet_command
from core.errors import AccessError, ConfigError
from core.loading import load_settings, parse_value
from core.logs import configure_logging
from core.settings import Settings

SERVICES = frozenset({"up", "broker", "serve", "ingest", "maintain", "update", "console"})
"""Commands that run until they are stopped."""


@dataclass
class Context:
    """The global flags."""

    file: Path | None
    flags: list[str]
    role: str = "ratchet"
    """What the log calls this process: the command's name."""

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
        """What ``--set`` says, by dotted name. Raises ConfigError."""
        return dict(_assignment(flag) for flag in self.flags)

    def command(self, *words: str) -> list[str]:
        """The command line that runs ``ratchet`` with ``words`` in a child, under the same settings."""
        return ratchet_command(*words, file=self.file, flags=self.flags)


def of(context: typer.Context) -> Context:
    """The :class:`Context` of a typer command."""
    shared = context.find_object(Context)
    return shared if shared is not None else Context(None, [])


def person() -> str:
    """Who runs this command, for the audit log: the name of the system's user, if it is one that can be recorded."""
    try:
        return OPERATOR.actor(getpass.getuser())
    except (AccessError, KeyError, OSError):  # in a container the user may have no name, or that of a part
        return OPERATOR.name


def _assignment(flag: str) -> tuple[str, Any]:
    name, equals, value = flag.partition("=")
    if not equals:
        raise ConfigError(f"--set {flag!r} is no assignment.", "Write --set NAME=VALUE, e.g. --set serve.port=9000.")
    return name.strip(), parse_value(name.strip(), value)
