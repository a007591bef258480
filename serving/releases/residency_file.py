"""The last known residency as a small file, from which a replica starts while the ledger is away.

    {"format": 1, "sha256": "<of the rest>", "residency": {"window": [...], ...}, "adapters": {"clip-...": "<digest>"}}

The digest is over the canonical JSON of residency and adapters, so that a file that is cut short or was changed is not
used. Every node has one in its home, and the artifacts have a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from core.digests import digest_json
from core.errors import ReleaseError
from serving.releases.residency import ResidencyRows

FORMAT: Final = 1
MAX_BYTES: Final = 1 << 20
"""Far above what a window of 16 releases with their reasons takes; more is not read."""
_ROWS: Final = TypeAdapter(ResidencyRows)
_DIGESTS: Final = TypeAdapter(dict[str, str])


@dataclass(frozen=True, slots=True)
class ResidencyCopy:
    """A residency, and the full digests of its adapters' directories as far as this node knows them."""

    rows: ResidencyRows
    adapters: Mapping[str, str] = field(default_factory=dict)
    """64 hex digits by the adapter's name; see :func:`core.artifacts.directory_digest`."""

    @property
    def number(self) -> int:
        """Of the live release."""
        return self.rows.window[0].number if self.rows.window else 0


def encode_copy(copy: ResidencyCopy) -> bytes:
    """The file's content."""
    content = {"residency": _ROWS.dump_python(copy.rows, mode="json"), "adapters": dict(copy.adapters)}
    return json.dumps({"format": FORMAT, "sha256": digest_json(content), **content}, indent=1).encode()


def decode_copy(data: bytes) -> ResidencyCopy:
    """What :func:`encode_copy` wrote.

    Raises:
        ReleaseError: the content is damaged, of another format, or without a release.
    """
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        content: Any = json.loads(data)
        version, expected = content.pop("format"), content.pop("sha256")
        if version != FORMAT:
            raise ValueError(f"format {version!r} is not {FORMAT}")
        if digest_json(content) != expected:
            raise ValueError("the digest is that of another content")
        copy = ResidencyCopy(_ROWS.validate_python(content["residency"]), _DIGESTS.validate_python(content["adapters"]))
        if not copy.rows.window:
            raise ValueError("it names no release")
        return copy
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as error:
        raise ReleaseError(f"the copy of the residency cannot be used: {str(error)[:200]}.") from None
