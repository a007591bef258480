"""Images in object stores, through fsspec: ``s3://`` with s3fs, ``gs://`` with gcsfs, where these are installed.

Endpoint and credentials are those of the process (the environment, a profile, the machine's role), so a record can
read whatever they can within ``ingest.allowed_uris``: list prefixes, not buckets with other things in them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import Any

import fsspec

from core.allow_rules import ObjectRule
from core.errors import RecordError
from streams.fetch_retries import TransientFetchError

log = logging.getLogger(__name__)
_PACKAGES = {"s3": 'pip install "ratchet-server[s3]"', "gs": "pip install gcsfs"}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
_PERMANENT_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
"""Of botocore, which must not be imported for other stores."""


class ObjectReader:
    """Reads whole objects of at most ``max_bytes``. For one event loop.

    Args:
        max_bytes: a larger object is refused by its size, and never read beyond this.
        stall_seconds: longest time for a connection, or without a byte.
        connections: most at once.
    """

    def __init__(self, max_bytes: int, stall_seconds: float, connections: int) -> None:
        self.max_bytes = max_bytes
        self.stall_seconds = stall_seconds
        self.connections = connections
        self._stores: dict[str, Any] = {}
        self._sessions: list[Any] = []
        self._opening = asyncio.Lock()

    async def read(self, place: ObjectRule) -> bytes:
        """The bytes of an object.

        Raises:
            RecordError: ``uri_not_allowed`` (the scheme's package is not installed), ``uri_unreachable`` (a
                TransientFetchError where another try may help) or ``image_too_large``.
        """
        uri = f"{place.scheme}://{place.bucket}/{place.key}"
        try:
            store = await self._store(place.scheme)
            path = f"{place.bucket}/{place.key}"
            size = (await store._info(path)).get("size") or 0
            if size > self.max_bytes:
                raise self._too_large(uri)
            # The range holds where the object has been replaced by a larger one since its size was read.
            data: bytes = await store._cat_file(path, start=0, end=self.max_bytes + 1) if size else b""
        except (RecordError, TimeoutError):
            raise
        except Exception as error:  # botocore and aiohttp have trees of their own
            raise self._unreachable(uri, error) from error
        if len(data) > self.max_bytes:
            raise self._too_large(uri)
        return data

    async def close(self) -> None:
        """Close the connections."""
        for session in self._sessions:
            await session.close()

    async def _store(self, scheme: str) -> Any:
        async with self._opening:
            if scheme not in self._stores:
                self._stores[scheme] = await self._open(scheme)
        return self._stores[scheme]

    async def _open(self, scheme: str) -> Any:
        options: dict[str, Any] = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
        if scheme == "s3":  # repeated by the caller, within its deadline
            options["config_kwargs"] = {
                "connect_timeout": self.stall_seconds,
                "read_timeout": self.stall_seconds,
                "retries": {"max_attempts": 0},
                "max_pool_connections": self.connections,
            }
        try:
            store = fsspec.filesystem(scheme, **options)
        except ImportError:
            raise RecordError(
                "uri_not_allowed",
                f"{scheme}:// is not read here: its package is not installed.",
                f"An operator can install it: {_PACKAGES[scheme]}",
            ) from None
        if scheme == "s3":
            store.retries = 1
        if hasattr(store, "set_session"):
            self._sessions.append(await store.set_session())
        return store

    def _too_large(self, uri: str) -> RecordError:
        return RecordError("image_too_large", f"{uri[:200]!r} has more than {self.max_bytes} bytes.", "Scale it down.")

    def _unreachable(self, uri: str, error: Exception) -> RecordError:
        # What the store said may name inner addresses and keys: it is for the log, not for who sent the record.
        log.info("%s could not be read: %s: %s", uri, type(error).__name__, error)
        if isinstance(error, FileNotFoundError):
            return _refusal(f"{uri[:200]!r} is not there.")
        if isinstance(error, PermissionError):
            return _refusal(f"{uri[:200]!r} may not be read by this process.")
        permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
        if permanent or (isinstance(error, OSError) and error.errno in _PERMANENT_ERRNOS):
            return _refusal(f"{uri[:200]!r} cannot be read.")
        return TransientFetchError(f"{uri[:200]!r} cannot be read now.")


def _refusal(message: str) -> RecordError:
    return RecordError("uri_unreachable", message, "Check the address and the rights of ingest, or send the image.")
