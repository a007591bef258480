"""Registered bases by their digests: what the ledger names a base by."""

from __future__ import annotations

import json
from pathlib import Path

from core.digests import digest12
from core.errors import BaseModelError
from serving.engines.clip_base import DESCRIPTION, ClipBase, list_bases, load_base


def base_of(home: Path, digest: str) -> ClipBase | None:
    """The registered CLIP base with a digest, if there is one here."""
    bases = (load_base(home, name) for name in list_bases(home, "clip"))
    return next((base for base in bases if base.digest == digest), None)


def digest_of(home: Path, name: str) -> str | None:
    """The digest of a registered CLIP base; None where there is none of that name."""
    return load_base(home, name).digest if name in list_bases(home, "clip") else None


def names_by_digest(home: Path | str) -> dict[str, str]:
    """Digest to name of every registered base, CLIP and VLM; one whose description cannot be read is left out."""
    names = {}
    for path in sorted((Path(home) / "bases").glob(f"*/{DESCRIPTION}")):
        try:
            names[str(json.loads(path.read_text())["digest"])] = path.parent.name
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return names


def shown(home: Path, digest: str) -> str:
    """A base for people: its name, where it is registered here, and 12 digits of its digest."""
    base = base_of(home, digest)
    return digest12(digest) if base is None else f"{base.name!r} ({digest12(digest)})"


def need_base(home: Path, digest: str, name: str) -> ClipBase:
    """The base with a digest. ``name``: what it was registered as. Raises BaseModelError."""
    base = base_of(home, digest)
    if base is None:
        raise BaseModelError(
            f"base {name!r} ({digest12(digest)}) is not registered in {home} any more.",
            f"Register it again: `ratchet base add {name} ...`, or `ratchet base pull {name}`.",
        )
    return base
