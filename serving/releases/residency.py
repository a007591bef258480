"""Residency: releases and adapters that stay loaded, read from the ledger or, while that is away, from the newest copy.
A copy is a small file in the home of every node and in the artifacts, with a digest of the canonical JSON of the rest:

    {"format": 1, "sha256": "<of the rest>", "residency": {"window": [...], ...}, "adapters": {"clip-...": "<digest>"}}
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from core import metrics
from core.artifacts import Artifacts
from core.dependencies import answered, noted
from core.digests import digest_json
from core.errors import LedgerUnavailable, RatchetError, ReleaseError
from core.files import replace_file
from core.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from core.settings import Settings
from serving.own_threads import BoundedCall
from serving.releases.leadership import Lineage
from serving.releases.types import ReleaseSnapshot, Residency

log = logging.getLogger("ratchet.residency")
FORMAT: Final = 1
MAX_BYTES: Final = 1 << 20
"""Far above what a window of 16 releases with their reasons takes."""
Source = Literal["ledger", "file", "artifacts"]
LEDGER_SECONDS: Final = 15.0
"""Three transactions, each of which the ledger bounds to five seconds."""
ARTIFACTS_SECONDS: Final = 5.0
KEEP_SECONDS: Final = 60.0
"""Interval of comparing the copies: a copy that a slower process overwrote does not stay."""
KEY: Final = "residency.json"
Spaces = Callable[[str | None], Awaitable[tuple[str, str] | None]]
"""Returns the image and text space of a CLIP adapter; None when its files are gone or damaged. Raises RatchetError when
no replica can tell now."""


@dataclass(frozen=True, slots=True)
class ResidencyRows:
    """Releases that are resident by the ledger. More than the window: after two releases of a VLM adapter, the one that
    a rollback of CLIP goes back to has left it, and without it the catalog would have to be embedded again."""

    window: tuple[ReleaseRow, ...]
    """Newest first; requests may name them. The live release and its incumbent (which answers next to a canary, and is
    the target of comparison and rollback), and the newest others that there is room for."""
    rollback_release: ReleaseRow | None
    """The release that a rollback of CLIP alone goes back to, if not in the window."""
    vlms: tuple[str | None, ...]
    """VLM adapters, the live one first; no more than the window has places."""

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        rows = self.window if self.rollback_release is None else (*self.window, self.rollback_release)
        return tuple(dict.fromkeys(row.clip for row in rows))

    @property
    def answering(self) -> tuple[ReleaseRow, ...]:
        """Releases for requests that name none: the live one and, during a canary or a shadow, the stable one."""
        stable = next((row for row in self.window if row.plain), None)
        return self.window[:1] if stable is None or self.window[0].plain else (self.window[0], stable)

    def needed(self, family: Family) -> tuple[str | None, ...]:
        """Adapters without which requests cannot be answered; the base alone before the first release."""
        return tuple(dict.fromkeys(row.adapter(family) for row in self.answering)) or (None,)


def read_residency(ledger: Ledger, size: int, base: str | None = None) -> ResidencyRows:
    """Read from the ledger ``size`` releases, and for each family the newest other adapter. ``base``: digest; only
    releases whose CLIP has this base."""
    with ledger.reading():
        newest = ledger.releases(size, base)
        if not newest:
            return ResidencyRows((), None, ())
        live = newest[0]
        incumbent = ledger.incumbent(live.number, base)
        first = {row.number: row for row in (live, incumbent) if row is not None}
        others = [row for row in newest if row.number not in first]
        window = sorted([*first.values(), *others[: size - len(first)]], key=lambda row: -row.number)
        rollback_release = ledger.before("clip", live.clip, base)
        if rollback_release is not None and rollback_release.clip in {row.clip for row in window}:
            rollback_release = None
        vlms = dict.fromkeys(row.vlm for row in window)
        if len(vlms) == 1 and (other := ledger.before("vlm", live.vlm, base)) is not None:
            vlms[other.vlm] = None
        return ResidencyRows(tuple(window), rollback_release, tuple(vlms))


async def resolve_residency(rows: ResidencyRows, spaces: Spaces) -> Residency:
    """Add the embedding spaces. Releases whose CLIP adapter is gone or damaged are left out, so that the newest
    loadable one is served. Raises RatchetError when the spaces of a release that answers requests are unknown."""
    answering = {row.number for row in rows.answering}
    window = [
        ReleaseSnapshot(row.number, row.clip, *pair, row.vlm, row.share)
        for row in rows.window
        if (pair := await _spaces_or_none(row, spaces, row.number in answering)) is not None
    ]
    indexed = list(window)
    older = rows.rollback_release
    if older is not None and (pair := await _spaces_or_none(older, spaces, not window)) is not None:
        indexed.append(ReleaseSnapshot(older.number, older.clip, *pair, older.vlm))
    return Residency(tuple(window or indexed), tuple(indexed), rows.vlms)


async def _spaces_or_none(row: ReleaseRow, spaces: Spaces, needed: bool) -> tuple[str, str] | None:
    try:
        return await spaces(row.clip)
    except RatchetError:
        if needed:
            raise
        return None


_ROWS: Final = TypeAdapter(ResidencyRows)
_DIGESTS: Final = TypeAdapter(dict[str, str])


def encode_copy(rows: ResidencyRows, adapters: Mapping[str, str]) -> bytes:
    """The content of a copy. ``adapters``: SHA-256 of their directories by name (64 hex digits, see
    :func:`core.artifacts.directory_digest`), as far as this node knows them."""
    content = {"residency": _ROWS.dump_python(rows, mode="json"), "adapters": dict(adapters)}
    return json.dumps({"format": FORMAT, "sha256": digest_json(content), **content}, indent=1).encode()


def decode_copy(data: bytes) -> tuple[ResidencyRows, dict[str, str]]:
    """The residency and digests of a copy. Raises ReleaseError when it is damaged, of another format, or without a
    release."""
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content: Any = json.loads(data)
        version, expected = content.pop("format"), content.pop("sha256")
        if version != FORMAT:
            raise ValueError(f"format {version!r} is not {FORMAT}")
        if digest_json(content) != expected:
            raise ValueError("the digest is that of another content")
        rows = _ROWS.validate_python(content["residency"])
        if not rows.window:
            raise ValueError("it names no release")
        return rows, _DIGESTS.validate_python(content["adapters"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleaseError(f"the copy of the residency cannot be used: {str(error)[:200]}.") from None


class ResidencySource:
    """Reads what is resident, and keeps copies of it. Use from one thread at a time."""

    def __init__(
        self,
        ledger: Ledger,
        size: int,
        path: Path,
        artifacts: Artifacts,
        part: str,
        digests: Callable[[], Mapping[str, str]] = dict,
        lineage: Lineage | None = None,
    ) -> None:
        """``path``: this node's copy. ``artifacts``: have another copy; may be away, as the ledger may. ``part``: for
        the metrics. ``digests``: the full digests of adapters that this node knows. ``lineage``: releases of another
        base are left out, and copies of them are not used."""
        self._lineage = lineage
        base = None if lineage is None else lineage.digest
        self._path = path
        self._artifacts = artifacts
        self._part = part
        self._digests = digests
        self._read_ledger = BoundedCall(lambda: read_residency(ledger, size, base), LEDGER_SECONDS)
        self._read_artifacts = BoundedCall(lambda: artifacts.read_bytes(KEY), ARTIFACTS_SECONDS)
        self._write_artifacts = BoundedCall(self._copy_to_artifacts, ARTIFACTS_SECONDS)
        self._newest: ResidencyRows | None = None
        self._written = b""
        self._keep_at = -float("inf")
        self.source: Source | None = None
        """Origin of the rows of :meth:`newest`."""
        self.adapters: Mapping[str, str] = {}
        """Full digests by adapter name, from the copy in use while the ledger is away."""

    @classmethod
    def of(
        cls, settings: Settings, ledger: Ledger, part: str, digests: Callable[[], Mapping[str, str]] = dict
    ) -> ResidencySource:
        return cls(
            ledger, settings.serve.rollback_window, residency_path(settings.home), Artifacts(settings.artifacts), part,
            digests, Lineage.of(settings),
        )  # fmt: skip

    def read(self) -> ResidencyRows:
        """The residency by the ledger. Raises LedgerUnavailable when it is away or does not answer within
        :data:`LEDGER_SECONDS`."""
        try:
            rows = self._read_ledger()
        except TimeoutError as error:
            away = LedgerUnavailable(f"the ledger does not answer: {error}.", state="slow")
            noted(away)
            raise away from None
        except LedgerUnavailable as error:
            noted(error)
            raise
        answered(["ledger"])
        self._use(rows, "ledger")
        return rows

    def newest(self) -> ResidencyRows:
        """The residency by the ledger; while that is away, what was read last or, before that, a copy. Raises
        LedgerUnavailable when there is no copy either."""
        try:
            return self.read()
        except RatchetError as error:
            if self._newest is not None:
                return self._newest
            copies = self._copies()
            if not copies:
                raise LedgerUnavailable(
                    f"{error.message} There is no copy of the residency either.", "Bring the ledger back."
                ) from None
            rows, self.adapters, source = max(copies, key=lambda copy: copy[0].window[0].number)
            number = rows.window[0].number
            log.warning("the ledger is away (%s): starting with release %d of the %s", error, number, source)
            self._use(rows, source)
            return rows

    def keep(self, rows: ResidencyRows) -> None:
        """Bring the copies up to date. A copy that cannot be written is tried again later."""
        if not rows.window:
            return
        known = self._digests()
        names = {name for name in (*rows.clips, *rows.vlms) if name is not None}
        data = encode_copy(rows, {name: known[name] for name in sorted(names & known.keys())})
        if data == self._written and time.monotonic() < self._keep_at:
            return
        self._keep_at = time.monotonic() + KEEP_SECONDS
        self._written = data
        try:
            if self._read_file() != data:
                replace_file(self._path, data)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)
        try:
            self._write_artifacts()
            answered(["artifacts"])
        except Exception as error:
            noted(error)
            log.warning("the artifacts cannot keep a copy of the residency: %s: %s", type(error).__name__, error)

    def _use(self, rows: ResidencyRows, source: Source) -> None:
        if self.source not in (None, source):
            log.warning("what is resident comes from the %s again", source)
        self._newest, self.source = rows, source
        metrics.release.residency_source(self._part, source)

    def _copies(self) -> list[tuple[ResidencyRows, dict[str, str], Source]]:
        copies: list[tuple[ResidencyRows, dict[str, str], Source]] = []
        readers: dict[Source, Callable[[], bytes]] = {"file": self._read_file, "artifacts": self._read_artifacts}
        for source, read in readers.items():
            try:
                if data := read():
                    rows, adapters = decode_copy(data)
                    if self._lineage is not None:
                        self._lineage.check(rows.window[0])
                    copies.append((rows, adapters, source))
            except Exception as error:
                log.warning("no residency from the %s: %s: %s", source, type(error).__name__, error)
        return copies

    def _read_file(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return b""

    def _copy_to_artifacts(self) -> None:
        if not self._artifacts.exists(KEY) or self._artifacts.read_bytes(KEY) != self._written:
            self._artifacts.write_bytes(KEY, self._written)


def residency_path(home: Path) -> Path:
    return home / "serving" / "residency.json"
