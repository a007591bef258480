from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.ledger import Ledger
from tests.unit.serving.releases.plain_replicas import Server


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for name in ("a", "b", "c"):
        made.register_adapter(name, family="clip", base="x", image_space=f"i-{name}", text_space="t", meta={})
    yield made
    made.close()


@pytest.fixture
async def server(ledger: Ledger) -> Server:
    made = Server(ledger)
    await made.start()
    return made
