"""Adapters recorded in the ledger."""

from __future__ import annotations

from pathlib import Path

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.ledger.collection import collected_error


def fetch_recorded(artifacts: Artifacts, ledger: Ledger, adapter: str) -> Path:
    """Fetch an adapter to a local directory and check it against the ledger's digest (a name is only 48 bits of it).
    Raises AdapterCollected: the garbage collector deleted it; AdapterError: it is not in the artifacts, or differs from
    what was recorded; LedgerUnavailable, ArtifactsUnavailable: a store cannot be reached."""
    for name, time in ledger.collected([adapter]).items():
        raise collected_error(name, time)
    return artifacts.fetch(f"adapters/{adapter}", ledger.adapter_digests([adapter]).get(adapter))
