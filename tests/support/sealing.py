"""Sealed items in tests of the gate and the updater."""

from __future__ import annotations

import pytest

from updater.gate.suite_items import Seal

NOTHING = Seal(b"")


@pytest.fixture(autouse=True)
def nothing_sealed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seal no item, as the key of a store is random and these homes are small. Tests of sealing take ``sealed``."""
    if "sealed" not in request.fixturenames:
        monkeypatch.setattr(Seal, "holds", lambda self, name: False)


@pytest.fixture
def sealed() -> None:
    """Seal a quarter of the items, as in service."""
