"""Images in folders of this machine that the operator listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from core.errors import RecordError


def read_file(uri: str, folders: Sequence[str], max_bytes: int) -> bytes:
    """The bytes of a regular file that lies under one of ``folders``, also after symbolic links are followed.

    Args:
        uri: ``file:///data/photos/a.png``.
        folders: entries like ``file:///data/photos``.
        max_bytes: the largest file.

    Raises:
        RecordError: ``uri_not_allowed``, ``uri_unreachable`` or ``image_too_large``.
    """
    try:
        if not any(_is_under(uri, folder) for folder in folders):
            raise not_allowed(uri)
        return _read(_path(uri), max_bytes)
    except ValueError:  # a malformed host or path
        raise not_allowed(uri) from None


def not_allowed(uri: str) -> RecordError:
    """The refusal of a URI that no entry of the list covers."""
    return RecordError(
        "uri_not_allowed",
        f"image_uri {uri[:200]!r} is under no allowed prefix.",
        "Send the image in the record, or add its prefix to `ingest.allowed_uris`.",
    )


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)).resolve()


def _is_under(uri: str, folder: str) -> bool:
    return urlsplit(uri).netloc in ("", "localhost") and _path(uri).is_relative_to(_path(folder))


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # a device or a pipe would never end
            raise FileNotFoundError(path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise RecordError(
            "uri_unreachable", f"{path} cannot be read: {error.strerror or 'no such file'}.", "Put the file in place."
        ) from error
    if len(data) > max_bytes:
        raise RecordError("image_too_large", f"the image has more than {max_bytes} bytes.", "Scale it down.")
    return data
