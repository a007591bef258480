"""Images that a record names instead of carrying: only from places that the operator listed.

An entry of ``ingest.allowed_uris`` is a prefix: ``file:///data/photos`` allows the files under that folder (also after
symbolic links are followed), ``https://cdn.example.org/images/`` what lies under that path on that host and port.
With an empty list nothing is fetched. Redirects are not followed: they would lead out of the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ops.errors import RecordError

TIMEOUT_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}


def fetch(uri: str, allowed: Sequence[str], max_bytes: int) -> bytes:
    """The bytes behind ``uri``, at most ``max_bytes``.

    Raises:
        RecordError: ``uri_not_allowed``, ``uri_unreachable`` or ``image_too_large``.
    """
    try:
        parts = urlsplit(uri)
        if parts.scheme == "file" and any(_file_is_under(uri, prefix) for prefix in allowed):
            return _read(_path(uri), max_bytes)
        if parts.scheme in _PORTS and any(_url_is_under(uri, prefix) for prefix in allowed):
            return _get(uri, max_bytes)
    except ValueError:  # a malformed port, host or path
        raise _not_allowed(uri) from None
    raise _not_allowed(uri)


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


def _url_is_under(uri: str, prefix: str) -> bool:
    want, have = urlsplit(prefix), urlsplit(uri)
    if want.scheme != have.scheme or have.username is not None or want.hostname != have.hostname:
        return False
    if (want.port or _PORTS[want.scheme]) != (have.port or _PORTS[have.scheme]):
        return False
    # "%2e%2e" and "\\" are decoded by some servers after the prefix has been compared.
    steps = unquote(have.path).replace("\\", "/").split("/")
    folder = want.path if want.path.endswith("/") else f"{want.path}/"
    return ".." not in steps and (have.path == want.path or have.path.startswith(folder))


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


def _get(uri: str, max_bytes: int) -> bytes:
    import httpx  # only deployments that allow URLs pay for it

    data = bytearray()
    try:
        with httpx.stream("GET", uri, timeout=TIMEOUT_SECONDS, follow_redirects=False) as response:
            if response.status_code != 200:
                raise RecordError(
                    "uri_unreachable",
                    f"{uri[:200]!r} answered {response.status_code}.",
                    "Check the address; redirects are not followed.",
                )
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    break
    except httpx.HTTPError as error:
        raise RecordError(
            "uri_unreachable", f"{uri[:200]!r} cannot be fetched: {error}.", "Check the address."
        ) from error
    return _bounded(bytes(data), max_bytes)


def _bounded(data: bytes, max_bytes: int) -> bytes:
    if len(data) > max_bytes:
        raise RecordError("image_too_large", f"the image has more than {max_bytes} bytes.", "Scale it down.")
    return data
