"""Callers and their rights, for the HTTP server and the console. Three kinds of callers:

    key          made with `ratchet keys create`; has the scopes it was given
    operator     the bootstrap key, ``settings.operator_key()``: every scope, so that the first key can be made
    anonymous    no key; may infer, search and report answers where the server is open (``access.require_keys``)

Keys are reread from the ledger every :data:`KEYS_SECONDS`, which bounds the time until a revocation takes effect. While
the ledger is unreachable, the keys read last stay valid until they expire, and a starting process uses a copy.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from core.errors import AccessError, RatchetError
from core.ledger.keys import PREFIX, RESERVED, SCOPES, KeyQueries, digest_of, parse_token
from core.ledger.rows import KeyRow, KeyScope
from core.settings import Settings

log = logging.getLogger("ratchet.access")
KEYS_SECONDS = 2.0
NEW_KEY_SECONDS = 0.2
"""Unknown keys are looked up before they are rejected, so that new ones work at once; such reads start this far apart,
and the caller waits for its own."""
READ_SECONDS = 1.0
"""Longest wait of a caller for a read of the keys; then those read last count."""
MAX_ACTOR_CHARS = 100
NEVER = float("-inf")
ANONYMOUS: frozenset[KeyScope] = frozenset({"infer", "search", "feedback"})
_NO_KEY = digest_of("")


@dataclass(frozen=True, slots=True)
class Principal:
    name: str
    scopes: frozenset[KeyScope]
    kind: Literal["key", "operator", "anonymous"] = "key"
    key_id: str | None = None
    requests_per_minute: int = 0
    """0: no limit."""

    def may(self, *scopes: KeyScope) -> bool:
        return not self.scopes.isdisjoint(scopes)

    def actor(self, claimed: str | None = None) -> str:
        """The name for the audit log. A key is ``key:<name>``, with the caller's claimed name after a slash. Only the
        holder of the bootstrap key has its claimed name. Claimed names have no colon, so none can pass for a key's.
        Raises AccessError if ``claimed`` is too long, not printable, has a colon, or is the name of a part of Ratchet.
        """
        claimed = claimed and _checked(claimed)
        if self.kind == "operator":
            return claimed or self.name
        own = f"key:{self.name}" if self.kind == "key" else self.name
        return f"{own}/{claimed}" if claimed else own


OPERATOR = Principal("operator", frozenset(SCOPES), "operator")


class Access:
    """Identifies callers by token. Safe to use from several threads."""

    def __init__(
        self, ledger: KeyQueries, settings: Settings, clock: Callable[[], float] = time.monotonic,
        recall: Callable[[], Sequence[KeyRow]] = tuple, pause: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """``recall``: returns a copy of the keys, for a start while the ledger is unreachable."""
        rules, local = settings.access, settings.serve.on_loopback
        self.open = rules.require_keys == "never" or (rules.require_keys == "auto" and local)
        self.metrics_open = rules.metrics == "open" or (rules.metrics == "auto" and self.open and local)
        self.to_this_machine = rules.require_keys != "never" and local
        """True if :attr:`open` only applies to callers on this machine, not to what a proxy forwards."""
        self.anonymous: Principal | None = None
        if self.open:
            limit = 0 if local else rules.anonymous_per_minute
            self.anonymous = Principal("anonymous", ANONYMOUS, "anonymous", requests_per_minute=limit)
        self._limit = rules.requests_per_minute
        self._operator = settings.operator_key()
        self._ledger = ledger
        self._recall = recall
        self._pause = pause
        self.clock = clock
        self._keys: dict[str, KeyRow] = {}
        self._read_at = NEVER
        self._current = False
        self._used: dict[str, datetime] = {}
        self._reading = threading.Lock()

    def identify(self, token: str | None) -> Principal | None:
        """The holder of a token; without one, the anonymous caller if the server is open. May read the ledger."""
        came = self.clock()
        while (delay := self.due(token, came)) is not None and self.clock() - came < READ_SECONDS:
            self._pause(delay)
            self.refresh(0.0 if self.knows(token) else READ_SECONDS)
            if self.knows(token):
                break
        return self.known(token)

    def known(self, token: str | None) -> Principal | None:
        """Like :meth:`identify`, with the keys read last."""
        if not token:
            return self.anonymous
        if same(token, self._operator.get_secret_value()):
            return OPERATOR
        parsed = parse_token(token)
        if parsed is None:
            # OpenAI's clients send any text if no key is needed; a truncated Ratchet key is a mistake.
            return None if token.startswith(PREFIX) else self.anonymous
        row = self._keys.get(parsed[0])
        right = same(digest_of(parsed[1]), row.digest if row is not None else _NO_KEY)
        if row is None or not right or row.expired():
            return None
        self._used[row.id] = datetime.now(UTC)
        limit = self._limit if row.requests_per_minute is None else row.requests_per_minute
        return Principal(row.name, frozenset(row.scopes), "key", row.id, limit)

    def due(self, token: str | None, came: float) -> float | None:
        """Seconds until the ledger must be read to identify this token; None: not needed. ``came``: the caller's
        arrival by :attr:`clock`; earlier reads may lack a newer key."""
        if parse_token(token or "") is None or self._read_at >= came:
            return None
        age = self.clock() - self._read_at
        if self.knows(token):
            return 0.0 if age >= KEYS_SECONDS else None
        return max(0.0, NEW_KEY_SECONDS - age)

    def ages(self, token: str | None) -> bool:
        """True if the keys should be reread soon, though a known token need not wait for it."""
        return self.knows(token) and self.clock() - self._read_at >= KEYS_SECONDS / 2

    @property
    def silent(self) -> bool:
        return not self._current

    def unread(self, token: str | None, came: float) -> bool:
        """True if this token may be a new key's: unknown, and no read that began after the caller came has
        succeeded."""
        unclear = self._read_at < came or not self._current
        return parse_token(token or "") is not None and not self.knows(token) and unclear

    def knows(self, token: str | None) -> bool:
        """True if the token names a known key, whether or not its secret is right."""
        parsed = parse_token(token or "")
        return parsed is not None and parsed[0] in self._keys

    def current(self) -> list[KeyRow] | None:
        """The keys; None if the last read of the ledger failed."""
        return list(self._keys.values()) if self._current else None

    def refresh(self, patience: float = 0.0) -> None:
        """Read the keys. During another thread's read, or an outage, those read last stay. ``patience``: seconds to
        wait for another thread; the very first read is always awaited."""
        first = self._read_at == NEVER
        if not self._reading.acquire(timeout=-1.0 if first else patience):
            return
        try:
            self._read()
        except RatchetError as error:
            if first:
                self._keys = {row.id: row for row in self._recall()}
            log.warning("the ledger is away, the keys read last stay good: %s", type(error).__name__)
        finally:
            self._reading.release()

    def _read(self) -> None:
        began = self.clock()
        if began - self._read_at < NEW_KEY_SECONDS:
            return  # another thread just did
        current = False
        try:
            self._keys = {row.id: row for row in self._ledger.api_keys()}
            current = True
        finally:
            self._current, self._read_at = current, began
        used, self._used = self._used, {}
        last = {key_id: row.last_used_at for key_id, row in self._keys.items()}
        due = {
            key_id: when
            for key_id, when in used.items()
            if key_id in last and (last[key_id] is None or when - last[key_id] >= timedelta(minutes=1))  # type: ignore[operator]
        }
        if due:
            self._ledger.touch_keys(due)


def same(given: str, right: str) -> bool:
    """Compare two secrets in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), right.encode("utf-8", "surrogatepass"))


def _checked(claimed: str) -> str:
    name = unicodedata.normalize("NFKC", claimed).strip()
    if not name or len(name) > MAX_ACTOR_CHARS or not name.isprintable() or ":" in name:
        raise AccessError(f"an actor is a name of 1 to {MAX_ACTOR_CHARS} printable characters without a colon.")
    if name.casefold() in RESERVED - {"operator"}:
        raise AccessError(f"{name!r} is a part of Ratchet, not a person.", "Say who you are.")
    return name
