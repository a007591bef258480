"""Fixtures of the release protocol: a real ledger, and replicas that are plain objects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ledger import Ledger
from serving.releases.protocol import ReleaseProtocol
from tests.unit.serving.releases.plain_replicas import PlainBroadcast


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for name in ("a", "b", "c"):
        made.register_adapter(name, family="clip", base="x", image_space=f"i-{name}", text_space="t", meta={})
    yield made
    made.close()


@pytest.fixture
def broadcast() -> PlainBroadcast:
    return PlainBroadcast()


@pytest.fixture
async def protocol(ledger: Ledger, broadcast: PlainBroadcast) -> ReleaseProtocol:
    """After its first release, of the bases alone."""
    made = ReleaseProtocol(ledger, broadcast, window=2)  # type: ignore[arg-type]
    await made.start()
    return made
