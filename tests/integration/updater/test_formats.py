"""A home written by an earlier version of Ratchet is opened, migrated and continued: see ``tests/data``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from core.ledger import Ledger
from tests.support.written_state import DATA, described_home, small_home, unpack
from updater.service.update_loop import UpdaterService


def holds_all_of(now: Any, then: Any) -> bool:
    """Whether the new description contains all of the old one; later versions may have more fields."""
    if isinstance(then, Mapping):
        return all(name in now and holds_all_of(now[name], value) for name, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(holds_all_of, now, then))
    return bool(now == then)


@pytest.mark.parametrize("version", ["0_1"])
def test_a_ledger_keeps_its_rows_and_an_update_goes_on_from_its_checkpoint(
    version: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written = DATA / f"written_by_{version}"
    settings = small_home(unpack(written / "home.tar.xz", tmp_path / "home"))
    described = json.loads((written / "home.json").read_text())
    with closing(Ledger.open(settings.ledger)) as ledger:
        now = described_home(ledger)
        for name, rows in described.items():
            assert holds_all_of(now[name], rows), name
        [interrupted] = [row["id"] for row in described["updates"] if row["state"] == "training"]
        UpdaterService(settings).step()
        assert "training goes on at step" in capfd.readouterr().err
        update = ledger.update(interrupted)
        assert update.state == "done" and update.adapter is not None
        assert ledger.live() is not None and ledger.held() is not None
