"""The operators' key of an installation that names none: made at first use, and kept beside its data."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def kept_key(path: Path) -> str:
    """The key in a file; where there is none, one is made, owner-readable."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".operator.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            with suppress(FileExistsError):
                os.link(staging, path)  # the first of two processes wins; both then read the same key
        finally:
            staging.unlink()
    return path.read_text().strip()
