from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core.ledger import Ledger
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Cause, Prepared
from serving.replicas import follower as module
from serving.replicas.follower import ResidencyFollower, check_start


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    opened.commit_release(1, clip=None, vlm=None, actor="t", reason="first", proposal_id=None)
    yield opened
    opened.close()


@dataclass
class Replica:
    """Loads every adapter that is not ``broken``."""

    ledger: Ledger
    loaded: list[str | None] = field(default_factory=list)
    broken: set[str | None] = field(default_factory=set)
    cause: Cause = "replica"
    away: bool = False
    kept: list[int] = field(default_factory=list)

    def read(self) -> ResidencyRows:
        if self.away:
            raise OSError("the ledger is away")
        return read_residency(self.ledger, 2)

    async def load(self, rows: ResidencyRows) -> list[Prepared]:
        needed = rows.needed("clip")
        self.loaded += needed
        return [self.answer(name) for name in needed]

    def answer(self, name: str | None) -> Prepared:
        return Prepared("r", name, error="no memory", cause=self.cause) if name in self.broken else Prepared("r", name)

    def keep(self, rows: ResidencyRows) -> None:
        self.kept.append(rows.window[0].number)

    def follower(self) -> ResidencyFollower:
        return ResidencyFollower("encoder", self.read, self.load, self.keep)


async def test_what_answering_needs_is_loaded_the_stable_side_of_a_canary_too(ledger: Ledger, tmp_path: Path) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="canary", proposal_id=None, share=0.1)
    replica = Replica(ledger)
    await replica.follower().step()
    assert replica.loaded == ["a", None]
    rows = read_residency(Ledger.open(f"sqlite:///{tmp_path / 'empty.db'}"), 2)
    assert (rows.needed("clip"), rows.needed("vlm")) == ((None,), (None,)), "the base, before the first release"


async def test_a_replica_that_lags_for_too_long_is_unhealthy_unless_another_one_would_not_have_the_adapter_either(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="r", proposal_id=None)
    replica = Replica(ledger, broken={"a"})
    follower = replica.follower()
    await follower.step()
    await follower.check()  # a lag that has just begun does not count
    monkeypatch.setattr(module, "LAG_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match="no memory"):
        await follower.check()
    for replica.cause in ("adapter", "storage"):
        await follower.step()
        await follower.check()


async def test_a_ledger_that_is_away_is_no_lag_and_the_next_reading_goes_on(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAG_SECONDS", -1.0)
    replica = Replica(ledger, away=True)
    follower = replica.follower()
    await follower.step()
    assert (replica.loaded, replica.kept) == ([], [])
    replica.away = False
    await follower.step()
    assert (replica.loaded, replica.kept) == ([None], [1])
    replica.away = True
    await follower.step()
    await follower.check()


@pytest.mark.parametrize(
    ("answers", "starts"),
    [
        ([Prepared("r", "a", error="gone", cause="adapter"), Prepared("r", None)], True),
        ([Prepared("r", "a", error="no memory", cause="replica"), Prepared("r", None)], False),
        ([Prepared("r", "a", error="gone", cause="adapter")], False),
        ([Prepared("r", "a"), Prepared("r", None, error="no memory", cause="replica")], True),
    ],
    ids=["live adapter gone", "replica at fault", "nothing can be served", "an older release cannot be loaded"],
)
def test_a_replica_starts_when_it_can_serve_what_every_other_one_could(answers: list[Prepared], starts: bool) -> None:
    if starts:
        check_start(answers, ["a"])
        return
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        check_start(answers, ["a"])


async def test_a_check_starts_to_follow_once(ledger: Ledger) -> None:
    replica = Replica(ledger)
    follower = replica.follower()
    before = asyncio.all_tasks()
    await follower.check()
    await follower.check()
    (task,) = asyncio.all_tasks() - before
    task.cancel()
