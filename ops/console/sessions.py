"""Who is signed in: one cookie, encrypted and signed (Fernet), so that the console itself remembers nothing.

The cookie holds the API key that the visitor signed in with. Each request asks who that key belongs to, so a key that
is revoked ends its sessions, and what the console does for a visitor the server sees under the visitor's own key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr

COOKIE = "ratchet_console"
MAX_COOKIE_CHARS = 4000
MAX_KEY_CHARS = 500
PURPOSE = b"ratchet console sessions"


@dataclass(frozen=True, slots=True)
class Session:
    """A visitor. ``key`` is empty before the sign-in."""

    csrf: str
    """Every form sends it back; a page of another site cannot know it."""
    key: str = ""
    provider: Mapping[str, Any] = field(default_factory=dict)
    """What the way to the identity provider and back has to remember (Authlib's), and then what signing out there
    needs; empty for a sign-in by a key."""

    @classmethod
    def new(cls, key: str = "") -> Session:
        """A session with a token of its own: a sign-in never keeps the one from before."""
        return cls(secrets.token_urlsafe(24), key)

    def sent_by_it(self, token: str) -> bool:
        """Whether a form carries this session's token; in constant time."""
        return hmac.compare_digest(token.encode(), self.csrf.encode())


class Sessions:
    """Seals sessions into cookies and opens them again.

    The secret comes from the operators' key: consoles side by side open each other's cookies, and changing that key
    ends every session.
    """

    def __init__(self, operator_key: SecretStr, hours: float) -> None:
        secret = hmac.digest(operator_key.get_secret_value().encode(), PURPOSE, hashlib.sha256)
        self._fernet = Fernet(base64.urlsafe_b64encode(secret))
        self.seconds = int(hours * 3600)

    def seal(self, session: Session) -> str:
        """The cookie's value."""
        return self._fernet.encrypt(json.dumps([session.csrf, session.key, dict(session.provider)]).encode()).decode()

    def open(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None when there is none, it is too old, or it was tampered with."""
        if not cookie or len(cookie) > MAX_COOKIE_CHARS:
            return None
        try:
            csrf, key, provider = json.loads(self._fernet.decrypt(cookie.encode(), ttl=self.seconds))
        except (InvalidToken, ValueError):
            return None
        return Session(csrf, key, provider)
