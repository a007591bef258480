"""Images that a record names instead of carrying: only from places that the operator listed.

An entry of ``ingest.allowed_uris`` is a folder (``file:///data/photos`` allows the files under it, also after symbolic
links are followed), or a place on the network as in :mod:`ops.allow_rules` (``https://cdn.example.org/images/`` allows
what lies under that path on that host and port). With an empty list nothing is fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ops.errors import RecordError

if TYPE_CHECKING:
    from streams.fetching import Fetcher

TIMEOUT_SECONDS = 10.0


def fetch(uri: str, allowed: Sequence[str], max_bytes: int, networks: Sequence[str] = ()) -> bytes:
    """The bytes behind ``uri``, at most ``max_bytes``.

    Args:
        uri: file, http or https.
        allowed: folders and places.
        networks: networks that are allowed although they are not public.

    Raises:
        RecordError: ``uri_not_allowed``, ``uri_unreachable``, ``image_too_large`` or ``image_format``.
    """
    try:
        scheme = urlsplit(uri).scheme
        if scheme == "file" and any(_file_is_under(uri, prefix) for prefix in allowed):
            return _read(_path(uri), max_bytes)
    except ValueError:  # a malformed port, host or path
        raise _not_allowed(uri) from None
    places = tuple(prefix for prefix in allowed if not prefix.startswith("file:"))
    if scheme not in ("http", "https") or not places:
        raise _not_allowed(uri)
    return asyncio.run(_fetcher(places, tuple(networks), max_bytes).fetch(uri))


@lru_cache(4)
def _fetcher(places: tuple[str, ...], networks: tuple[str, ...], max_bytes: int) -> Fetcher:
    from streams.fetching import Fetcher, Rules  # only deployments that allow URLs pay for it

    return Fetcher(
        Rules(
            places, networks, max_bytes, TIMEOUT_SECONDS, connections=2,
            rules_setting="ingest.allowed_uris", networks_setting="ingest.allowed_networks",
        )
    )  # fmt: skip


def _not_allowed(uri: str) -> RecordError:
    return RecordError(
        "uri_not_allowed",
        f"image_uri {uri[:200]!r} is under no allowed prefix.",
        "Send the image in the record, or add its prefix to `ingest.allowed_uris`.",
    )


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)).resolve()


def _file_is_under(uri: str, prefix: str) -> bool:
    allowed = urlsplit(prefix)
    if allowed.scheme != "file" or urlsplit(uri).netloc not in ("", "localhost"):
        return False
    return _path(uri).is_relative_to(_path(prefix))


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # a device or a pipe would never end
            raise FileNotFoundError(path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise RecordError(
            "uri_unreachable",
            f"{path} cannot be read: {error.strerror or 'no such file'}.",
            "Put the file in place.",
        ) from error
    return _bounded(data, max_bytes)


def _bounded(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise RecordError("image_too_large", f"the image has more than {max_bytes} bytes.", "Scale it down.")
    return data
