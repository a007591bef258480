"""Claims on image spaces, so that catalogs on the same lake do not drop each other's tables. Each catalog rewrites a
small file next to the tables every :data:`RENEW_SECONDS`, and reads the others' before it drops a table. No clocks are
compared: a claim expires when its content has not changed for :data:`CLAIM_SECONDS` on the reader's clock."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection
from typing import Final

import fsspec

RENEW_SECONDS: Final = 10.0
CLAIM_SECONDS: Final = 60.0
FOLDER: Final = "claims"


class SpaceClaims:
    """Writes one claim and reads those of others. Use from one thread."""

    def __init__(self, url: str, holder: str, now: Callable[[], float] = time.monotonic) -> None:
        """``url``: the catalog's folder; ``holder``: hexadecimal digits unique to this process."""
        self._files, root = fsspec.core.url_to_fs(url)
        self._folder = f"{root}/{FOLDER}"
        self._name = f"{holder}.json"
        self._now = now
        self._spaces: tuple[str, ...] = ()
        self._count = 0
        self._written = -RENEW_SECONDS
        self._seen: dict[str, tuple[bytes, float]] = {}

    def renew(self, spaces: Collection[str]) -> None:
        """Claim exactly these spaces. Writes when they changed or a renewal is due."""
        claimed = tuple(sorted(spaces))
        if claimed == self._spaces and self._now() - self._written < RENEW_SECONDS:
            return
        self._files.makedirs(self._folder, exist_ok=True)
        content = json.dumps({"spaces": claimed, "count": self._count + 1}).encode()
        self._files.pipe_file(f"{self._folder}/{self._name}", content)
        self._spaces, self._count, self._written = claimed, self._count + 1, self._now()

    def claimed_by_others(self, spaces: Collection[str]) -> set[str]:
        """Those of ``spaces`` that others claim. Removes expired claims; an unreadable one counts for all spaces."""
        claimed: set[str] = set()
        seen: dict[str, tuple[bytes, float]] = {}
        for path in self._others():
            try:
                content = bytes(self._files.cat_file(path))
            except FileNotFoundError:
                continue
            before, since = self._seen.get(path, (b"", 0.0))
            seen[path] = content, since if before == content else self._now()
            if self._now() - seen[path][1] > CLAIM_SECONDS:
                self._remove(path)
                continue
            try:
                claimed.update(map(str, json.loads(content)["spaces"]))
            except (ValueError, KeyError, TypeError):  # being written, or damaged
                claimed.update(spaces)
        self._seen = seen
        return claimed.intersection(spaces)

    def close(self) -> None:
        self._remove(f"{self._folder}/{self._name}")

    def _others(self) -> list[str]:
        self._files.invalidate_cache(self._folder)
        try:
            paths = map(str, self._files.ls(self._folder, detail=False))
        except FileNotFoundError:
            return []
        return sorted(path for path in paths if path.endswith(".json") and path.rpartition("/")[2] != self._name)

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(path)
