"""Where a replica learns what is resident: the ledger or, while that is away, the newest copy."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

from core import metrics
from core.artifacts import Artifacts
from core.dependencies import answered, noted
from core.errors import LedgerUnavailable, RatchetError
from core.files import replace_file
from core.ledger import Ledger
from core.settings import Settings
from serving.releases.bounded_call import BoundedCall
from serving.releases.lineage import Lineage
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.residency_file import MAX_BYTES, ResidencyCopy, decode_copy, encode_copy

log = logging.getLogger("ratchet.residency")
Source = Literal["ledger", "file", "artifacts"]
LEDGER_SECONDS: Final = 15.0
"""The three transactions of a reading, each of which the ledger bounds to five seconds."""
ARTIFACTS_SECONDS: Final = 5.0
KEEP_SECONDS: Final = 60.0
"""How often the copies are compared again: a copy that a slower process overwrote does not stay."""
KEY: Final = "residency.json"


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
        """Args:
        ledger: may be away.
        size: releases of the rollback window.
        path: this node's copy.
        artifacts: have another copy; may be away.
        part: for the metrics.
        digests: the full digests of adapters that this node knows.
        lineage: releases of another base are left out, and copies of them are not used.
        """
        self._lineage = lineage
        base = None if lineage is None else lineage.digest
        self._path = path
        self._artifacts = artifacts
        self._part = part
        self._digests = digests
        self._read_ledger = BoundedCall(lambda: read_residency(ledger, size, base), LEDGER_SECONDS)
        self._read_artifacts = BoundedCall(lambda: artifacts.read_bytes(KEY), ARTIFACTS_SECONDS)
        self._pending = b""
        self._write_artifacts = BoundedCall(self._copy_to_artifacts, ARTIFACTS_SECONDS)
        self._newest: ResidencyRows | None = None
        self._written = b""
        self._keep_at = -float("inf")
        self.source: Source | None = None
        """Where :meth:`newest` has its rows from."""
        self.adapters: Mapping[str, str] = {}
        """Full digests by the adapter's name, from the copy that is used while the ledger is away."""

    @classmethod
    def of(
        cls, settings: Settings, ledger: Ledger, part: str, digests: Callable[[], Mapping[str, str]] = dict
    ) -> ResidencySource:
        """The source that the settings describe."""
        return cls(
            ledger, settings.serve.rollback_window, residency_path(settings.home), Artifacts(settings.artifacts), part,
            digests, Lineage.of(settings),
        )  # fmt: skip

    def read(self) -> ResidencyRows:
        """What the ledger says.

        Raises:
            LedgerUnavailable: it is away, or does not answer within :data:`LEDGER_SECONDS`.
        """
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
        """What the ledger says; while it is away what was read last and, before the first reading, the newest copy.

        Raises:
            LedgerUnavailable: the ledger is away, and there is no copy.
        """
        try:
            return self.read()
        except RatchetError as error:
            if self._newest is not None:
                return self._newest
            copies = list(self._copies())
            if not copies:
                raise LedgerUnavailable(
                    f"{error.message} There is no copy of the residency either.", "Bring the ledger back."
                ) from None
            copy, source = max(copies, key=lambda each: each[0].number)
            log.warning("the ledger is away (%s): starting with release %d of the %s", error, copy.number, source)
            self.adapters = copy.adapters
            self._use(copy.rows, source)
            return copy.rows

    def keep(self, rows: ResidencyRows) -> None:
        """Bring the copies up to date with the ledger. A copy that cannot be written is tried again later."""
        if not rows.window:
            return
        known = self._digests()
        names = {name for name in (*rows.clips, *rows.vlms) if name is not None}
        data = encode_copy(ResidencyCopy(rows, {name: known[name] for name in sorted(names & known.keys())}))
        if data == self._written and time.monotonic() < self._keep_at:
            return
        self._keep_at = time.monotonic() + KEEP_SECONDS
        self._written = data
        try:
            if self._read_file() != data:
                replace_file(self._path, data)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)
        self._pending = data
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

    def _copies(self) -> list[tuple[ResidencyCopy, Source]]:
        copies: list[tuple[ResidencyCopy, Source]] = []
        readers: tuple[tuple[Source, Callable[[], bytes]], ...] = (
            ("file", self._read_file), ("artifacts", self._read_artifacts),
        )  # fmt: skip
        for source, read in readers:
            try:
                if data := read():
                    copy = decode_copy(data)
                    if self._lineage is not None:
                        self._lineage.check(copy.rows.window[0])
                    copies.append((copy, source))
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
        data = self._pending
        if not self._artifacts.exists(KEY) or self._artifacts.read_bytes(KEY) != data:
            self._artifacts.write_bytes(KEY, data)


def residency_path(home: Path) -> Path:
    """This node's copy of the residency."""
    return home / "serving" / "residency.json"
