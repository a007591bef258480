"""A copy of the API keys, so that a server that starts while the ledger is away knows its clients.

    {"format": 1, "hmac": "<of the rest>", "keys": [{"id": "0123abcd", "name": "ci-bot", "digest": "...", ...}]}

It has digests of the secrets, no secret. The artifacts have it for new nodes, and each node for itself. It is signed
with the operator key (HMAC-SHA-256): who may write the artifacts cannot make a key with it.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr, TypeAdapter, ValidationError

from core.artifacts import Artifacts
from core.files import replace_file
from core.ledger.rows import KeyRow
from core.settings import Settings
from serving.errors import Unavailable
from serving.own_threads import BoundedCall

log = logging.getLogger("ratchet.access")
FORMAT: Final = 1
KEY: Final = "keys.json"
ARTIFACTS_SECONDS: Final = 5.0
MAX_BYTES: Final = 16 << 20
"""A key takes some 300 bytes; more is not read from the file."""
_ROWS: Final = TypeAdapter(list[KeyRow])


class KeyCopy:
    """Keeps the keys that were read last. What cannot be written or read is logged. Use from one thread at a time."""

    def __init__(self, path: Path, artifacts: Artifacts, secret: SecretStr) -> None:
        """Args:
        path: this node's copy.
        artifacts: have another copy; may be away.
        secret: the operator key.
        """
        self._path = path
        self._secret = secret
        self._artifacts = artifacts
        self._pending = self._written = b""
        self._read_artifacts = BoundedCall(lambda: artifacts.read_bytes(KEY), ARTIFACTS_SECONDS)
        self._write_artifacts = BoundedCall(lambda: artifacts.write_bytes(KEY, self._pending), ARTIFACTS_SECONDS)

    @classmethod
    def of(cls, settings: Settings) -> KeyCopy:
        """The copy that the settings describe."""
        return cls(key_copy_path(settings.home), Artifacts(settings.artifacts), settings.operator_key())

    def keep(self, rows: Iterable[KeyRow]) -> None:
        """Write the keys, where they differ from those that this process has written last."""
        data = self._encode(rows)
        if data == self._written:
            return
        try:
            replace_file(self._path, data, mode=0o600)
            self._pending = data
            self._write_artifacts()
            self._written = data
        except Exception as error:
            log.warning("the copy of the keys cannot be written, and is tried again: %s", error)

    def read(self) -> list[KeyRow]:
        """The keys of the artifacts' copy, else of the node's; none where no copy is whole and signed."""
        for source, read in (("artifacts", self._read_artifacts), ("file", self._read_file)):
            try:
                return self._decode(read())
            except Exception as error:
                log.warning("no keys from the %s: %s: %s", source, type(error).__name__, str(error)[:200])
        return []

    def _read_file(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(MAX_BYTES)

    def _encode(self, rows: Iterable[KeyRow]) -> bytes:
        stable = [replace(row, last_used_at=None) for row in sorted(rows, key=lambda row: row.id)]
        keys = _ROWS.dump_python(stable, mode="json")
        return json.dumps({"format": FORMAT, "hmac": self._sign(keys), "keys": keys}, indent=1).encode()

    def _decode(self, data: bytes) -> list[KeyRow]:
        try:
            content: Any = json.loads(data)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            if not hmac.compare_digest(self._sign(content["keys"]), content["hmac"]):
                raise ValueError("it is not signed with the operator key of this server")
            return _ROWS.validate_python(content["keys"])
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            raise Unavailable(f"the copy of the keys cannot be used: {str(error)[:200]}.") from None

    def _sign(self, keys: Any) -> str:
        text = json.dumps(keys, sort_keys=True, separators=(",", ":"))
        return hmac.new(self._secret.get_secret_value().encode(), text.encode(), "sha256").hexdigest()


def key_copy_path(home: Path) -> Path:
    """This node's copy."""
    return home / "serving" / "keys.json"
