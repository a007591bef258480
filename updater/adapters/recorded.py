"""Adapters as the ledger has recorded them."""

from __future__ import annotations

from pathlib import Path

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.ledger.collection import collected_error


def fetch_recorded(artifacts: Artifacts, ledger: Ledger, adapter: str) -> Path:
    """A local directory with an adapter whose files have the digest of the ledger; a name is only 48 bits of it.

    Raises:
        AdapterCollected: the garbage collector took it.
        AdapterError: it is not in the artifacts, or is not the one that was recorded.
        LedgerUnavailable, ArtifactsUnavailable: a store is away.
    """
    for name, time in ledger.collected([adapter]).items():
        raise collected_error(name, time)
    return artifacts.fetch(f"adapters/{adapter}", ledger.adapter_digests([adapter]).get(adapter))
