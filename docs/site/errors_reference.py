"""The page of the errors: what the API answers and what the command line prints, from the classes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import core.errors
import serving.errors
from core.errors import RatchetError
from ratchet_client.records import REASONS
from serving.errors import ServingError
from serving.http.errors import KNOWN, TYPES

Error = TypeVar("Error", bound=RatchetError)
HEAD = """# Errors

Every error has a message and, where there is one, a fix. The command line prints both and ends with status 1; the API
answers with the [error object](api.md#errorbody), whose `code` is stable. What to do:
[Troubleshooting](../troubleshooting.md).
"""
SERVING = """
## Of a request to the models

| status | `code` | |
|---|---|---|"""
OTHERS = """
## Of releases, stores and the broker

| status | `code` | |
|---|---|---|"""
CLASSES = """
## On the command line

| error | |
|---|---|"""
REFUSALS = """
## Reasons of refused records and images

A refused record is in quarantine with one of these codes; the API uses the same for images (`image_url_...` for
`uri_...`).

"""
STATUSES = """
## Types by status

| status | `type` |
|---|---|"""


def page() -> str:
    """The page."""
    return "\n".join([HEAD, *_parts(), ""])


def _parts() -> Iterator[str]:
    yield SERVING
    for kind in _classes(serving.errors.__dict__, ServingError):
        yield f"| {kind.status} | `{kind.code}` | {_meaning(kind)} |"
    yield OTHERS
    yield from (f"| {status} | `{code}` | {_meaning(kind)} |" for kind, (status, code, _) in KNOWN.items())
    yield CLASSES
    yield from (f"| {kind.__name__} | {_meaning(kind)} |" for kind in _classes(core.errors.__dict__, RatchetError))
    yield REFUSALS + ", ".join(f"`{reason}`" for reason in sorted(REASONS))
    yield STATUSES
    yield from (f"| {status} | `{name}` |" for status, name in TYPES.items())


def _classes(names: dict[str, object], base: type[Error]) -> list[type[Error]]:
    """The errors of a module without their base, in their order."""
    return [each for each in names.values() if isinstance(each, type) and issubclass(each, base) and each is not base]


def _meaning(kind: type[RatchetError]) -> str:
    return re.sub(r"``(.+?)``", r"`\1`", " ".join((kind.__doc__ or "").split())).replace("|", "\\|")
