"""Old versions of objects: what a bucket with versioning keeps of the files that Lance has removed.

They are deleted where the bucket allows it. Object lock, or a missing right, keeps them; a deletion says so.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from core.artifacts.object_store import open_filesystem
from streams.store.table import outage

AT_ONCE: Final = 1000
"""Most that S3 deletes in a call."""
ASKED: Final = 20
"""The retention of so many versions is asked for, the last written first: those are locked the longest."""
ELSEWHERE: Final = (
    "Old versions of objects were not looked for, which is done in s3:// only: see to versioning and soft delete."
)
UNLISTED: Final = (
    "Old versions of objects were not looked for: the right s3:ListBucketVersions is missing. "
    "If the bucket has versioning, they are still there."
)


@dataclass(frozen=True, slots=True)
class OldVersion:
    """A version of an object that is not the current one."""

    key: str
    id: str
    size: int
    """Bytes."""
    modified: datetime


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of what was deleted."""

    words: str
    until: datetime | None = None
    """When it may be deleted, where that is known."""


class OldVersions:
    """The old versions of all objects of a lake.

    Every method raises StoreUnavailable when the object store does not answer.
    """

    def __init__(self, lake: str) -> None:
        self.unknown = ""
        """Why they cannot be looked for; empty where they can."""
        self._lake = lake
        self._left: list[OldVersion] = []
        self._store: Any = None
        scheme = lake.partition("://")[0] if "://" in lake else "file"
        if scheme in ("s3", "s3a"):
            self._store, root = open_filesystem(lake)
            self._bucket, _, below = root.partition("/")
            self._prefix = f"{below.rstrip('/')}/" if below else ""
        elif scheme not in ("file", "memory"):
            self.unknown = ELSEWHERE

    def purge(self) -> None:
        """Delete them, as far as the bucket allows it."""
        if self._store is None:
            return
        old = self._list()
        for start in range(0, len(old), AT_ONCE):
            batch = [{"Key": each.key, "VersionId": each.id} for each in old[start : start + AT_ONCE]]
            try:
                self._call("delete_objects", Delete={"Objects": batch, "Quiet": True})
            except PermissionError:
                break
        self._left = self._list() if old else []

    def left(self, before: datetime) -> Remains | None:
        """What :meth:`purge` left of files that were written before some time; None where it left nothing."""
        left = sorted((each for each in self._left if each.modified < before), key=lambda each: each.modified)
        if not left:
            return None
        count = f"{len(left):,} old versions of objects ({sum(each.size for each in left):,} bytes) in {self._lake}"
        locks = [self._lock(each) for each in reversed(left[-ASKED:])]
        times = [each for each in locks if isinstance(each, datetime)]
        if "held" in locks:
            return Remains(f"{count}: under a legal hold.")
        if times:
            return Remains(f"{count}: under object lock.", max(times))
        return Remains(f"{count}: they could not be deleted. Allow s3:DeleteObjectVersion.")

    def _list(self) -> list[OldVersion]:
        try:
            return [
                OldVersion(each["Key"], each["VersionId"], int(each.get("Size") or 0), each["LastModified"])
                for page in self._pages()
                for each in page.get("Versions") or ()
                if not each["IsLatest"]
            ]
        except PermissionError:
            self.unknown = UNLISTED
            return []

    def _pages(self) -> Iterator[dict[str, Any]]:
        after: dict[str, str] = {}
        while True:
            page = self._call("list_object_versions", Prefix=self._prefix, **after)
            yield page
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker") or ""}

    def _lock(self, version: OldVersion) -> datetime | str:
        """Until when it is locked, ``held`` for a legal hold, and nothing where the store tells of neither."""
        try:
            told = self._store.call_s3("head_object", Bucket=self._bucket, Key=version.key, VersionId=version.id)
        except OSError:
            return ""
        held = told.get("ObjectLockLegalHoldStatus") == "ON"
        until: datetime | str = told.get("ObjectLockRetainUntilDate") or ""
        return "held" if held else until

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._store.call_s3(method, Bucket=self._bucket, **options)
        except PermissionError:
            raise
        except Exception as error:  # botocore and aiohttp have trees of their own
            if getattr(error, "errno", None) == errno.ENOSYS:  # of a server that knows no versions
                return {}
            raise outage(self._lake, "searched for old versions", error) from error
        return answer
