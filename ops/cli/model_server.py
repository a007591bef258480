"""How a command finds the model server and the key that it calls it with: the same for all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from core.errors import ConfigError
from core.settings import Settings
from ops.cli import context as ctx

if TYPE_CHECKING:
    from ratchet_client import Client

ServerOption = Annotated[
    str | None, typer.Option("--server", help="URL of the model server; server_url of the settings by default.")
]


def operator_client(settings: Settings, timeout: float = 60.0) -> Client:
    """A client of the server at ``settings.server``, with the operators' key and the caller's name.

    Args:
        timeout: seconds of one call.

    Raises:
        ConfigError: the server is another machine's, and this one has no key for it. A key that were made here would be
            one that the server does not know.
    """
    from ratchet_client import Client

    if settings.server_url is not None and not settings.has_operator_key:
        raise ConfigError(
            f"there is no operator key for {settings.server_url}.",
            "Set RATCHET_SERVE__OPERATOR_KEY to serving's serve.operator_key, or to a key with the scope operate.",
        )
    key = settings.operator_key().get_secret_value()
    return Client(settings.server, key, actor=ctx.person(), timeout=timeout, retries=0)
