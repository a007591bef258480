"""Queries of API keys. A token reads ``rk_<id>_<secret>``: the ID (8 characters, not secret) finds the row, the secret
is 64 hex digits. It has 256 random bits, so storing a plain SHA-256 is safe."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, get_args

from sqlalchemy import or_, select, update
from sqlalchemy.exc import IntegrityError

from core.errors import LedgerError
from core.ledger.database import Queries
from core.ledger.events import note
from core.ledger.rows import AUDITOR, SYSTEM_ACTORS, KeyRow, KeyScope, utc_now

SCOPES: Final[tuple[KeyScope, ...]] = get_args(KeyScope)
PREFIX: Final = "rk_"
TOKEN: Final = re.compile(rf"{PREFIX}([a-z0-9]{{8}})_([0-9a-f]{{64}})")
KEY_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
MAX_DAYS: Final = 3660
#: Names in the audit log for Ratchet's own parts and the bootstrap key, and callers without a key.
RESERVED: Final = SYSTEM_ACTORS | {"operator", "anonymous", AUDITOR}


class KeyQueries(Queries):
    def create_key(
        self, name: str, scopes: Sequence[str], *, actor: str, requests_per_minute: int | None = None,
        days: float | None = None,
    ) -> tuple[KeyRow, str]:  # fmt: skip
        """Create a key. Returns its row and its token, which is not stored and cannot be shown again.

        Args:
            name: lower-case letters, digits and ``. _ @ -``; never used before, not even by a revoked key.
            requests_per_minute: None: ``access.requests_per_minute``, 0: no limit.
            days: until it expires; None: never.

        Raises LedgerError if the name is taken, or an argument is invalid.
        """
        chosen = _checked(name, scopes, requests_per_minute)
        if days is not None and not 0 < days <= MAX_DAYS:
            raise LedgerError(f"a key cannot be valid for {days:g} days.", f"Give more than 0, at most {MAX_DAYS}.")
        expires = None if days is None else utc_now() + timedelta(days=days)
        key_id, secret = secrets.token_hex(4), secrets.token_hex(32)
        row = KeyRow(
            id=key_id, name=name, scopes=list(chosen), digest=digest_of(secret), actor=actor,
            requests_per_minute=requests_per_minute, expires_at=expires,
        )  # fmt: skip
        try:
            with self.database.write() as session:
                session.add(row)
                detail = {
                    "id": key_id, "scopes": list(chosen), "requests_per_minute": requests_per_minute,
                    "expires_at": expires and expires.isoformat(timespec="seconds"),
                }  # fmt: skip
                note(session, actor, "create key", f"key {name}", detail)
                session.flush()
                return row, f"{PREFIX}{key_id}_{secret}"
        except IntegrityError:
            raise LedgerError(
                f"there is or was a key named {name!r}.",
                "Names are not used twice, so that the audit log stays clear. Choose another, e.g. with a number.",
            ) from None

    def revoke_key(self, key: str, *, actor: str, reason: str) -> KeyRow:
        """Revoke a key by its ID or name. Raises LedgerError if there is none, or it was revoked before."""
        with self.database.write() as session:
            row = session.scalars(select(KeyRow).where(or_(KeyRow.id == key, KeyRow.name == key))).first()
            if row is None:
                raise LedgerError(f"there is no key {key!r}.", "See `ratchet keys list`.")
            if row.revoked_at is not None:
                raise LedgerError(f"key {row.name!r} was revoked at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC already.")
            row.revoked_at = utc_now()
            note(session, actor, "revoke key", f"key {row.name}", {"id": row.id, "reason": reason})
            session.flush()
            return row

    def api_keys(self, ended: bool = False) -> list[KeyRow]:
        """Valid keys, newest first; with ``ended`` also revoked and expired ones."""
        query = select(KeyRow).order_by(KeyRow.created_at.desc(), KeyRow.id)
        if not ended:
            query = query.where(
                KeyRow.revoked_at.is_(None), or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > utc_now())
            )
        return self._all(query)

    def touch_keys(self, used: Mapping[str, datetime]) -> None:
        with self.database.write() as session:
            for key_id, when in used.items():
                session.execute(update(KeyRow).where(KeyRow.id == key_id).values(last_used_at=when))


def parse_token(token: str) -> tuple[str, str] | None:
    match = TOKEN.fullmatch(token)
    return None if match is None else (match[1], match[2])


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _checked(name: str, scopes: Sequence[str], requests_per_minute: int | None) -> tuple[KeyScope, ...]:
    if not KEY_NAME.fullmatch(name) or name in RESERVED:
        raise LedgerError(
            f"{name[:80]!r} cannot be the name of a key.",
            f"Use 1 to 64 lower-case letters, digits and . _ @ -, and none of {', '.join(sorted(RESERVED))}.",
        )
    wrong = [scope for scope in scopes if scope not in SCOPES]
    if wrong or not scopes:
        what = f"scope {wrong[0]!r} is not known." if wrong else f"key {name!r} has no scope."
        raise LedgerError(what, f"Scopes are {', '.join(SCOPES)}.")
    if requests_per_minute is not None and requests_per_minute < 0:
        raise LedgerError(f"{requests_per_minute} requests per minute is not a limit.", "Give 1 or more, or 0: none.")
    return tuple(scope for scope in SCOPES if scope in scopes)
