"""Secrets are not shown: neither in logs nor by ``ratchet config show``."""

from __future__ import annotations

import re
from collections.abc import Iterable

STARS = "**********"
LEAST_CHARS = 8
"""Shorter values are no secrets worth the name, and would be found in words."""
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]*@")
"""Of a URL."""
_PARAMETER = re.compile(r"(?i)([?&][^=&\s]*(?:password|secret|token|key|signature)[^=&\s]*=)[^&\s]+")
_NAMED = re.compile(
    r"(?i)((?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|operator[_-]?key)"
    r"[\"']?\s*[=:]\s*[\"']?)(?!\*\*)[^\s\"',;&)}\]]+"
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}")
_API_KEY = re.compile(r"\b(rk_[0-9A-Za-z]{1,16}_)[0-9A-Za-z]+")
"""A key of ours: its id is no secret, see :mod:`core.ledger.keys`."""


def redact_url(text: str) -> str:
    """A URL without its password, and without the parameters of its query that hold secrets.

    >>> redact_url("postgresql://ann:hunter2@db/ratchet")
    'postgresql://ann:**********@db/ratchet'
    """
    shown = _PASSWORD.sub(rf"\g<1>{STARS}@", text)
    return _PARAMETER.sub(rf"\g<1>{STARS}", shown)


class Redactor:
    """Takes secrets out of text: those it was given, and what looks like a key, a password or a token.

    >>> Redactor(["correct-horse"]).redact("Authorization: Bearer rk_0a1b2c3d_ffff, then correct-horse")
    'Authorization: Bearer **********, then **********'
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """``secrets``: values that are never shown, wherever they stand; those under 8 characters are left out."""
        longest_first = sorted({each for each in secrets if len(each) >= LEAST_CHARS}, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def redact(self, text: str) -> str:
        """``text`` with stars in the place of secrets."""
        if self._secrets is not None:
            text = self._secrets.sub(STARS, text)
        text = _BEARER.sub(rf"\g<1>\g<2>{STARS}", redact_url(text))
        return _NAMED.sub(rf"\g<1>{STARS}", _API_KEY.sub(rf"\g<1>{STARS}", text))
