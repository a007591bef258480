"""Images that a record references by URI, only from places that the operator listed in ``ingest.allowed_uris``: folders
(``file:///data/photos`` allows the files under it, also after symbolic links are followed), network locations and
object store prefixes, the latter two as in :mod:`core.addresses`. An empty list allows nothing. Objects are read
through fsspec: ``s3://`` with s3fs, ``gs://`` with gcsfs, where installed, with the endpoint and credentials of the
process. A record can read whatever those can within the list: list prefixes, not buckets with other data."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import fsspec
from anyio import CancelScope
from anyio.from_thread import BlockingPortal, start_blocking_portal

from core.addresses import ObjectRule, is_object
from core.errors import RecordError
from core.settings.streams import Ingest
from streams.records.fetching import Fetcher, Rules, TransientFetchError

log = logging.getLogger(__name__)
FETCHES: Final = 32
"""Concurrent fetches per process. Memory: this many times ``ingest.max_image_bytes``, 256 MiB."""
FETCH_SECONDS: Final = 30.0
"""Per image, with all attempts: a host that hangs gets four, and delays its partition no longer than that."""
PROBE_SECONDS = 5.0
MAX_HOSTS = 1024
"""Hosts remembered. Beyond that, those with nothing in flight are forgotten."""
RETRIES = 3
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0


class UriFetcher:
    """Fetches images by URI for many threads, on its own event loop. Thread safe. Transient failures (timeouts, broken
    connections, 408, 425, 429, 5xx) are retried :data:`RETRIES` times, with growing pauses or those that the server
    asks for; ``seconds`` bounds one image from the start of its first attempt. Failing hosts do not delay others
    (:class:`FetchLimits`). Memory: at most ``fetches`` times ``max_image_bytes``."""

    def __init__(self, limits: Ingest, fetches: int = FETCHES, seconds: float = FETCH_SECONDS) -> None:
        self.limits, self.fetches, self.seconds = limits, fetches, seconds
        self._folders = [text for text in limits.allowed_uris if text.startswith("file:")]
        self._objects = [ObjectRule.parse(text) for text in limits.allowed_uris if is_object(text)]
        hosts = [text for text in limits.allowed_uris if not text.startswith("file:") and not is_object(text)]
        self._stall_seconds = seconds / 4  # leaves time for another attempt after one that hangs
        self._seats = FetchLimits(fetches, seconds)
        self._reader = _ObjectReader(limits.max_image_bytes, self._stall_seconds, fetches)
        rules = Rules(
            hosts, limits.allowed_networks, limits.max_image_bytes, seconds, fetches, self._stall_seconds,
            rules_setting="ingest.allowed_uris", networks_setting="ingest.allowed_networks",
        )  # fmt: skip
        self._fetcher = Fetcher(rules) if hosts else None
        self._lock = threading.Lock()
        self._closed = False
        self._running = ExitStack()
        self._portal: BlockingPortal | None = None

    def fetch(self, uri: str) -> bytes:
        """Fetch the bytes of ``uri`` (file, http, https, s3 or gs). Blocks. Raises RecordError: ``uri_not_allowed``,
        ``uri_unreachable``, ``image_too_large`` or ``image_format``; asyncio.CancelledError if the fetcher was closed
        meanwhile: not an ``Exception``, because the record is not at fault."""
        try:
            return self.submit(uri).result()
        except CancelledError:
            raise asyncio.CancelledError("the fetcher was closed") from None

    def submit(self, uri: str) -> Future[bytes]:
        """Start a fetch; the future has the bytes or :meth:`fetch`'s RecordError. Files are read immediately."""
        done: Future[bytes] = Future()
        try:
            if uri[:5].lower() == "file:":
                done.set_result(_read_file(uri, self._folders, self.limits.max_image_bytes))
                return done
            if is_object(uri):
                place = self._object(uri)
                origin = f"{place.scheme}://{place.bucket}"
                return self._start(origin, lambda: self._reader.read(place))
            if self._fetcher is None:
                raise _not_allowed(uri)
            fetcher = self._fetcher
            return self._start(fetcher.origin(uri), lambda: fetcher.fetch(uri))
        except RecordError as error:
            done.set_exception(error)
            return done

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._portal is not None:
            with suppress(RuntimeError):  # closed already
                self._portal.call(self._portal.stop, True)
            self._running.close()
        if self._fetcher is not None:
            self._fetcher.close()

    def _start(self, origin: str, attempt: Callable[[], Awaitable[bytes]]) -> Future[bytes]:
        with self._lock:
            if self._closed:
                raise asyncio.CancelledError("the fetcher was closed")
            if self._portal is None:
                self._portal = self._running.enter_context(start_blocking_portal(name="uris"))
                self._portal.start_task_soon(self._reader.close_at_end)
            return self._portal.start_task_soon(self._retry, origin, attempt)

    async def _retry(self, origin: str, attempt: Callable[[], Awaitable[bytes]]) -> bytes:
        clock = asyncio.get_running_loop().time
        deadline: float | None = None
        for tries in count(1):
            try:
                async with asyncio.timeout_at(deadline), self._seats.seat(origin):
                    deadline = deadline or clock() + self.seconds
                    async with asyncio.timeout_at(deadline):
                        return await attempt()
            except TransientFetchError as error:
                failure = error
            except TimeoutError:
                failure = TransientFetchError(f"{origin!r} took longer than {self.seconds:g} s.")
            pause = pause_before(tries, failure.retry_after)
            if tries > RETRIES or clock() + pause >= (deadline or 0.0):
                raise TransientFetchError(f"{failure.message} Tries: {tries}.", failure.retry_after)
            await asyncio.sleep(pause)
        raise AssertionError("count() has no end")

    def _object(self, uri: str) -> ObjectRule:
        try:
            place = ObjectRule.parse(uri)
        except ValueError:
            raise _not_allowed(uri) from None
        if not place.key or not any(rule.covers(place) for rule in self._objects):
            raise _not_allowed(uri)
        return place


def _read_file(uri: str, folders: Sequence[str], max_bytes: int) -> bytes:
    """Read a regular file under one of ``folders``, also after symbolic links are followed. Raises RecordError:
    ``uri_not_allowed``, ``uri_unreachable`` or ``image_too_large``."""
    try:
        local = urlsplit(uri).netloc in ("", "localhost")
        if not local or not any(_path(uri).is_relative_to(_path(folder)) for folder in folders):
            raise _not_allowed(uri)
        path = _path(uri)
    except ValueError:  # a malformed host or path
        raise _not_allowed(uri) from None
    try:
        if not path.is_file():  # reading a device or a pipe would never end
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


def _not_allowed(uri: str) -> RecordError:
    return RecordError(
        "uri_not_allowed",
        f"image_uri {uri[:200]!r} is under no allowed prefix.",
        "Send the image in the record, or add its prefix to `ingest.allowed_uris`.",
    )


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)).resolve()


_PACKAGES = {"s3": 'pip install "ratchet-server[s3]"', "gs": "pip install gcsfs"}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
_PERMANENT_ERRNOS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
_PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
"""Exceptions of botocore, which must not be imported for other stores."""


@dataclass(eq=False)
class _ObjectReader:
    """Reads whole objects of at most ``max_bytes``. For one event loop. ``stall_seconds`` is the longest time for a
    connection, or without a byte."""

    max_bytes: int
    stall_seconds: float
    connections: int
    _stores: dict[str, Any] = field(default_factory=dict)
    _sessions: list[Any] = field(default_factory=list)
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def read(self, place: ObjectRule) -> bytes:
        """Read an object. Raises RecordError: ``uri_not_allowed`` (the scheme's package is not installed),
        ``uri_unreachable`` (a TransientFetchError if a retry may help) or ``image_too_large``."""
        uri = f"{place.scheme}://{place.bucket}/{place.key}"
        try:
            store = await self._store(place.scheme)
            path = f"{place.bucket}/{place.key}"
            size = (await store._info(path)).get("size") or 0
            if size > self.max_bytes:
                raise self._too_large(uri)
            # The range bounds an object that was replaced by a larger one since its size was read.
            data: bytes = await store._cat_file(path, start=0, end=self.max_bytes + 1) if size else b""
        except (RecordError, TimeoutError):
            raise
        except Exception as error:  # botocore and aiohttp have their own exception trees
            raise self._explained(uri, error) from error
        if len(data) > self.max_bytes:
            raise self._too_large(uri)
        return data

    async def close_at_end(self) -> None:
        """Close the connections when the loop ends and cancels this task."""
        try:
            await asyncio.Event().wait()
        finally:
            with CancelScope(shield=True):
                for session in self._sessions:
                    await session.close()

    async def _store(self, scheme: str) -> Any:
        async with self._opening:
            if scheme not in self._stores:
                self._stores[scheme] = await self._open(scheme)
        return self._stores[scheme]

    async def _open(self, scheme: str) -> Any:
        options: dict[str, Any] = {"asynchronous": True, "skip_instance_cache": True, "use_listings_cache": False}
        if scheme == "s3":  # the caller retries, within its deadline
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

    def _explained(self, uri: str, error: Exception) -> RecordError:
        # The store's message may contain internal addresses and keys: log it, but do not show it to the sender.
        log.info("%s could not be read: %s: %s", uri, type(error).__name__, error)
        if isinstance(error, FileNotFoundError):
            return _unreachable(f"{uri[:200]!r} is not there.")
        if isinstance(error, PermissionError):
            return _unreachable(f"{uri[:200]!r} may not be read by this process.")
        permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
        if permanent or (isinstance(error, OSError) and error.errno in _PERMANENT_ERRNOS):
            return _unreachable(f"{uri[:200]!r} cannot be read.")
        return TransientFetchError(f"{uri[:200]!r} cannot be read now.")


def _unreachable(message: str) -> RecordError:
    return RecordError("uri_unreachable", message, "Check the address and the rights of ingest, or send the image.")


@dataclass(slots=True)
class _Host:
    window: int
    active: int = 0
    waiting: int = 0
    failing_since: float | None = None
    failed_at: float = 0.0
    probe_at: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FetchLimits:
    """Slots for fetches, per host and in total (``seats``). For one event loop. A host that has only failed for
    ``down_seconds`` is down."""

    def __init__(self, seats: int, down_seconds: float) -> None:
        self.seats = seats
        self.down_seconds = down_seconds
        self._all = asyncio.Semaphore(seats)
        self._hosts: dict[str, _Host] = {}

    @asynccontextmanager
    async def seat(self, name: str) -> AsyncIterator[None]:
        """Wait for a slot of host ``name`` and hold it during the block, whose outcome counts for the host. Raises
        RecordError ``uri_unreachable`` if the host is down."""
        host = self._host(name)
        await self._enter(name, host)
        try:
            async with self._all:
                yield
            self._answered(host)
        except (TransientFetchError, TimeoutError, asyncio.CancelledError):
            self._failed(host)
            raise
        except RecordError:  # the host answered
            self._answered(host)
            raise
        finally:
            host.active -= 1
            host.changed.set()
            host.changed = asyncio.Event()

    async def _enter(self, name: str, host: _Host) -> None:
        host.waiting += 1
        try:
            while host.active >= host.window and not self._is_down(host):
                await host.changed.wait()
        finally:
            host.waiting -= 1
        if self._is_down(host):
            now = time.monotonic()
            if host.active or now < host.probe_at:
                raise RecordError(
                    "uri_unreachable",
                    f"{name!r} has not answered for {now - (host.failing_since or now):.0f} s.",
                    "Send the record again from quarantine when the host answers.",
                )
            host.probe_at = now + PROBE_SECONDS
        host.active += 1

    def _host(self, name: str) -> _Host:
        if name not in self._hosts and len(self._hosts) >= MAX_HOSTS:
            self._hosts = {key: each for key, each in self._hosts.items() if each.active or each.waiting}
        return self._hosts.setdefault(name, _Host(max(1, self.seats // 4)))

    def _is_down(self, host: _Host) -> bool:
        now = time.monotonic()
        long = host.failing_since is not None and now - host.failing_since > self.down_seconds
        return long and now - host.failed_at <= self.down_seconds  # an old failure says nothing about now

    def _answered(self, host: _Host) -> None:
        host.failing_since = None
        host.window = min(self.seats, host.window * 2)

    def _failed(self, host: _Host) -> None:
        now = time.monotonic()
        if host.failing_since is None or now - host.failed_at > self.down_seconds:
            host.failing_since = now
        host.failed_at = now
        host.window = 1


def pause_before(retry: int, retry_after: float | None = None) -> float:
    """Seconds to wait before retry ``retry`` (the first is 1). Exponential, with half of it random, so that images that
    failed together are not retried together; at least what the server asked for."""
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** (retry - 1), LONGEST_PAUSE_SECONDS)
    pause = longest * random.uniform(0.5, 1.0)  # noqa: S311
    return max(pause, retry_after or 0.0)
