"""The digest that a record states for its image: ``sha256:<hex>``, as OCI descriptors write it.

>>> check_digest(b"hello", "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")
"""

from __future__ import annotations

import hashlib
import re

from core.errors import RecordError

_FORMS = {"sha256": re.compile("[0-9a-f]{64}"), "sha512": re.compile("[0-9a-f]{128}")}


def parse_digest(text: object) -> tuple[str, str]:
    """Algorithm and lower-case hex digits of a digest.

    Raises:
        RecordError: ``schema``, it is none that is known.
    """
    algorithm, _, digits = text.lower().partition(":") if isinstance(text, str) else ("", "", "")
    form = _FORMS.get(algorithm)
    if form is None or not form.fullmatch(digits):
        raise RecordError(
            "schema",
            f"`image_digest` {str(text)[:80]!r} is no digest that is known.",
            "Give sha256:<64 hex digits> or sha512:<128 hex digits> of the encoded image.",
        )
    return algorithm, digits


def check_digest(image: bytes, text: str) -> None:
    """Compare an image with its stated digest.

    Raises:
        RecordError: ``uri_digest``, the bytes are others; ``schema``, the digest is none that is known.
    """
    algorithm, stated = parse_digest(text)
    actual = hashlib.new(algorithm, image).hexdigest()
    if actual != stated:
        raise RecordError(
            "uri_digest",
            f"the image has the digest {algorithm}:{actual[:12]}..., the record states {algorithm}:{stated[:12]}....",
            "State the digest of the encoded image as it is sent or stored, or send the record again.",
        )
