"""Which image spaces the catalogs of other servers on the same lake hold, so that nobody drops their tables.

Each catalog keeps one small file beside the tables, which it writes anew every :data:`RENEW_SECONDS`. Whoever is about
to drop a table reads the files of the others. No clocks are compared: a claim is over when its file was not written
anew for :data:`CLAIM_SECONDS`, by the reader's own clock, since the reader first saw it as it is.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection
from typing import Any, Final

import fsspec

RENEW_SECONDS: Final = 10.0
CLAIM_SECONDS: Final = 60.0
FOLDER: Final = "claims"
MOST_BYTES: Final = 1 << 16
MOST_CLAIMS: Final = 100
"""More servers than that are on no lake; their files would be read at each release."""
_HOLDER: Final = re.compile(r"[0-9a-f]{8,64}")


class SpaceClaims:
    """Writes one claim, and reads those of others. Use from one thread."""

    def __init__(self, url: str, holder: str, now: Callable[[], float] = time.monotonic) -> None:
        """Args:
        url: of the catalog's folder.
        holder: hexadecimal digits that name this process and no other.
        """
        self._files, root = fsspec.core.url_to_fs(url)
        self._folder = f"{root}/{FOLDER}"
        self._holder = holder
        self._now = now
        self._spaces: tuple[str, ...] = ()
        self._count = 0
        self._written = -RENEW_SECONDS
        self._seen: dict[str, tuple[bytes, float]] = {}

    def renew(self, spaces: Collection[str]) -> None:
        """Claim these spaces, and no others any more. Writes when they changed, or when it is time."""
        claimed = tuple(sorted(spaces))
        if claimed == self._spaces and self._now() - self._written < RENEW_SECONDS:
            return
        self._files.makedirs(self._folder, exist_ok=True)
        content = json.dumps({"spaces": claimed, "count": self._count + 1}).encode()
        self._files.pipe_file(self._path(self._holder), content)
        self._spaces, self._count, self._written = claimed, self._count + 1, self._now()

    def claimed_by_others(self, spaces: Collection[str]) -> set[str]:
        """Those of some spaces that another claim names which is not over. A claim that is over is removed; one that
        cannot be read may name anything.
        """
        claimed: set[str] = set()
        seen: dict[str, tuple[bytes, float]] = {}
        for holder in self._others():
            content = self._read(holder)
            if content is None:
                continue
            known = self._seen.get(holder)
            since = known[1] if known is not None and known[0] == content else self._now()
            if self._now() - since > CLAIM_SECONDS:
                self._remove(holder)
                continue
            seen[holder] = (content, since)
            named = _spaces_in(content)
            claimed.update(spaces if named is None else named)
        self._seen = seen
        return claimed.intersection(spaces)

    def close(self) -> None:
        """Give the claim up."""
        self._remove(self._holder)

    def _others(self) -> list[str]:
        self._files.invalidate_cache(self._folder)
        try:
            paths = self._files.ls(self._folder, detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rpartition("/")[2].removesuffix(".json") for path in paths)
        return sorted(name for name in names if _HOLDER.fullmatch(name) and name != self._holder)[:MOST_CLAIMS]

    def _read(self, holder: str) -> bytes | None:
        try:
            return bytes(self._files.cat_file(self._path(holder), 0, MOST_BYTES))
        except FileNotFoundError:
            return None

    def _remove(self, holder: str) -> None:
        try:
            self._files.rm_file(self._path(holder))
        except FileNotFoundError:
            return

    def _path(self, holder: str) -> str:
        return f"{self._folder}/{holder}.json"


def _spaces_in(content: bytes) -> list[str] | None:
    """Of a claim; None when it is being written at this moment, or is damaged."""
    try:
        claim: Any = json.loads(content)
        return [str(space) for space in claim["spaces"]]
    except (ValueError, KeyError, TypeError):
        return None
