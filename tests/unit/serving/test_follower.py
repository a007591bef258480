"""A replica that no broadcast reached: it reads the ledger, loads what is missing, and says when it lags behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ops.ledger import Ledger
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Prepared
from serving.replicas import follower as module
from serving.replicas.follower import ResidencyFollower


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    opened.commit_release(1, clip=None, vlm=None, actor="t", reason="first", proposal_id=None)
    yield opened
    opened.close()


@dataclass
class Replica:
    """Loads every adapter but those that are ``broken``."""

    ledger: Ledger
    loaded: list[str | None] = field(default_factory=list)
    broken: set[str | None] = field(default_factory=set)
    away: bool = False

    def read(self) -> ResidencyRows:
        if self.away:
            raise OSError("the ledger is away")
        return read_residency(self.ledger, 2)

    async def load(self, rows: ResidencyRows) -> list[Prepared]:
        needed = rows.needed("clip")
        self.loaded += needed
        return [Prepared("r", name, error="damaged" if name in self.broken else "") for name in needed]

    def follower(self) -> ResidencyFollower:
        return ResidencyFollower("encoder", self.read, self.load)


async def test_what_answering_needs_is_loaded_the_stable_side_of_a_canary_too(ledger: Ledger) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="canary", proposal_id=None, share=0.1)
    replica = Replica(ledger)
    await replica.follower().step()
    assert replica.loaded == ["a", None]


async def test_before_the_first_release_the_base_is_needed(tmp_path: Path) -> None:
    rows = read_residency(Ledger.open(f"sqlite:///{tmp_path / 'empty.db'}"), 2)
    assert (rows.needed("clip"), rows.needed("vlm")) == ((None,), (None,))


@pytest.mark.parametrize(("broken", "away", "reason"), [(None, True, "is away"), ("a", False, "damaged")])
async def test_a_replica_that_lags_for_too_long_is_unhealthy_and_says_why(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, broken: str | None, away: bool, reason: str
) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="r", proposal_id=None)
    follower = Replica(ledger, broken={broken}, away=away).follower()
    await follower.step()
    await follower.check()  # a lag that has just begun is none
    monkeypatch.setattr(module, "LAG_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match=reason):
        await follower.check()


async def test_a_check_starts_to_follow_once(ledger: Ledger) -> None:
    replica = Replica(ledger)
    follower = replica.follower()
    before = asyncio.all_tasks()
    await follower.check()
    await follower.check()
    (task,) = asyncio.all_tasks() - before
    task.cancel()
