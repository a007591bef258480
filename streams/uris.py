"""Images that a record names instead of carrying: only from places that the operator listed.

An entry of ``ingest.allowed_uris`` is a folder (``file:///data/photos`` allows the files under it, also after symbolic
links are followed), a place on the network or a prefix in an object store, both as in :mod:`core.allow_rules`
(``https://cdn.example.org/images/`` allows what lies under that path on that host and port, ``s3://bucket/images/`` the
objects under that prefix). With an empty list nothing is fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from itertools import count
from typing import TYPE_CHECKING

from core.allow_rules import ObjectRule, is_object
from core.errors import RecordError
from core.settings.streams import Ingest
from streams.codecs import check_digest, parse_digest
from streams.fetch_limits import FetchLimits
from streams.fetch_retries import TransientFetchError, pause_before
from streams.loop_thread import LoopThread
from streams.object_stores import ObjectReader
from streams.uri_files import not_allowed, read_file

if TYPE_CHECKING:
    from streams.fetching import Fetcher


class UriFetcher:
    """Fetches images by URI for many threads, on one event loop of its own. Thread safe.

    At most ``uri_concurrency`` images are in flight; what may pass (timeouts, broken connections, 408, 425, 429, 5xx)
    is tried ``uri_retries`` times more, with growing pauses or those that the server asks for. ``uri_seconds`` bounds
    one image from the beginning of its first try. Hosts that fail do not hold up others
    (:mod:`streams.fetch_limits`). Memory: at most ``uri_concurrency`` times ``max_image_bytes``.

    >>> fetcher = UriFetcher(settings.ingest)
    >>> image = fetcher.fetch("https://cdn.example.org/images/bus.png", "sha256:2cf24dba...")
    >>> fetcher.close()
    """

    def __init__(self, limits: Ingest) -> None:
        self.limits = limits
        self._folders = [text for text in limits.allowed_uris if text.startswith("file:")]
        self._objects = [ObjectRule.parse(text) for text in limits.allowed_uris if is_object(text)]
        self._hosts = [text for text in limits.allowed_uris if not text.startswith("file:") and not is_object(text)]
        self._stall_seconds = limits.uri_seconds / 4  # so that a try that hangs leaves time for another
        self._seats = FetchLimits(limits.uri_concurrency, limits.uri_seconds)
        self._reader = ObjectReader(limits.max_image_bytes, self._stall_seconds, limits.uri_concurrency)
        self._fetcher = self._http_fetcher() if self._hosts else None
        self._loop = LoopThread("uris", self._reader.close)

    def fetch(self, uri: str, digest: str | None = None) -> bytes:
        """The bytes behind ``uri``. Waits for them.

        Args:
            uri: file, http, https, s3 or gs.
            digest: what the bytes must have, ``sha256:<hex>``.

        Raises:
            RecordError: ``uri_not_allowed``, ``uri_unreachable``, ``uri_digest``, ``image_too_large``,
                ``image_format``, or ``schema`` for a malformed digest.
            asyncio.CancelledError: the fetcher was closed meanwhile. No ``Exception``: the record is not to blame.
        """
        if digest is not None:
            parse_digest(digest)
        try:
            image = self.submit(uri).result()
        except CancelledError:
            raise asyncio.CancelledError("the fetcher was closed") from None
        if digest is not None:
            check_digest(image, digest)
        return image

    def submit(self, uri: str) -> Future[bytes]:
        """Start to fetch; the future has the bytes or :meth:`fetch`'s RecordError. A file is read at once."""
        done: Future[bytes] = Future()
        try:
            if uri[:5].lower() == "file:":
                done.set_result(read_file(uri, self._folders, self.limits.max_image_bytes))
                return done
            if is_object(uri):
                place = self._object(uri)
                origin = f"{place.scheme}://{place.bucket}"
                return self._loop.submit(self._patiently(origin, lambda: self._reader.read(place)))
            if self._fetcher is None:
                raise not_allowed(uri)
            fetcher = self._fetcher
            return self._loop.submit(self._patiently(fetcher.origin(uri), lambda: fetcher.fetch(uri)))
        except RecordError as error:
            done.set_exception(error)
            return done

    def close(self) -> None:
        """Cancel what is in flight, close all connections and end the thread."""
        self._loop.close()
        if self._fetcher is not None:
            self._fetcher.close()

    async def _patiently(self, origin: str, attempt: Callable[[], Awaitable[bytes]]) -> bytes:
        """Try until it is there, cannot come, or the time is over."""
        clock = asyncio.get_running_loop().time
        deadline: float | None = None
        for tries in count(1):
            try:
                async with asyncio.timeout_at(deadline), self._seats.seat(origin):
                    deadline = deadline or clock() + self.limits.uri_seconds
                    async with asyncio.timeout_at(deadline):
                        return await attempt()
            except TransientFetchError as error:
                failure = error
            except TimeoutError:
                failure = TransientFetchError(f"{origin!r} took longer than {self.limits.uri_seconds:g} s.")
            pause = pause_before(tries, failure.retry_after)
            if tries > self.limits.uri_retries or clock() + pause >= (deadline or 0.0):
                raise TransientFetchError(f"{failure.message} Tries: {tries}.", failure.retry_after)
            await asyncio.sleep(pause)
        raise AssertionError("count() has no end")

    def _object(self, uri: str) -> ObjectRule:
        try:
            place = ObjectRule.parse(uri)
        except ValueError:
            raise not_allowed(uri) from None
        if not place.key or not any(rule.covers(place) for rule in self._objects):
            raise not_allowed(uri)
        return place

    def _http_fetcher(self) -> Fetcher:
        from streams.fetching import Fetcher, Rules  # only deployments that allow URLs pay for it

        limits = self.limits
        return Fetcher(
            Rules(
                self._hosts, limits.allowed_networks, limits.max_image_bytes, limits.uri_seconds,
                limits.uri_concurrency, self._stall_seconds,
                rules_setting="ingest.allowed_uris", networks_setting="ingest.allowed_networks",
            )
        )  # fmt: skip
