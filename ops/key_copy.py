"""The API keys of the ledger as a small file of this node, so that a server that starts while the ledger is away knows
its clients.

    {"format": 1, "sha256": "<of the rest>", "keys": [{"id": "0123abcd", "name": "ci-bot", "digest": "...", ...}]}

It has digests of the secrets, no secret. It stays on the node, readable by its owner only, beside the operator's key:
whoever can change it could read that one too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from ops.digests import digest_json
from ops.files import replace_file
from ops.ledger.rows import KeyRow

log = logging.getLogger("ratchet.access")
FORMAT: Final = 1
MAX_BYTES: Final = 16 << 20
"""A key takes some 300 bytes; more is not read."""
_ROWS: Final = TypeAdapter(list[KeyRow])


def key_copy_path(home: Path) -> Path:
    """This node's copy."""
    return home / "serving" / "keys.json"


class KeyCopy:
    """Keeps the keys that were read last. A copy that cannot be written or read is logged, and changes nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = b""

    def keep(self, rows: Iterable[KeyRow]) -> None:
        """Write the keys, where they differ from those that this process has written last."""
        stable = [replace(row, last_used_at=None) for row in sorted(rows, key=lambda row: row.id)]
        keys = _ROWS.dump_python(stable, mode="json")
        data = json.dumps({"format": FORMAT, "sha256": digest_json(keys), "keys": keys}, indent=1).encode()
        if data == self._kept:
            return
        try:
            replace_file(self._path, data, mode=0o600)
            self._kept = data
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)

    def read(self) -> list[KeyRow]:
        """The keys of the copy; none where there is no whole copy."""
        try:
            with self._path.open("rb") as file:
                content: Any = json.loads(file.read(MAX_BYTES))
            if content["format"] != FORMAT or digest_json(content["keys"]) != content["sha256"]:
                raise ValueError("another format, or the digest of another content")
            return _ROWS.validate_python(content["keys"])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            log.warning("%s cannot be used: %s", self._path, str(error)[:200])
            return []
