from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from core.errors import LedgerUnavailable, ReleaseError
from core.ledger import Ledger
from serving.releases.auto_rollback import Fallback
from serving.releases.protocol import ReleaseProtocol
from serving.releases.residency import read_residency
from serving.releases.types import Prepared
from serving.replicas.follower import ResidencyReader
from tests.unit.serving.releases.plain_replicas import PlainBroadcast


@dataclass
class DamagedBroadcast(PlainBroadcast):
    """Two encoders and a VLM that cannot load ``gone`` adapters; the second encoder has copies of ``cached`` ones."""

    gone: set[str] = field(default_factory=set)
    cached: set[str] = field(default_factory=set)

    async def prepare(self, clip: str | None) -> list[Prepared]:
        self.prepared.append(clip)
        return [self.encoder(replica, clip) for replica in (1, 2)]

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        return [Prepared("v1", vlm, error="no file", cause="adapter") if vlm in self.gone else Prepared("v1", vlm)]

    def encoder(self, replica: int, clip: str | None) -> Prepared:
        if clip in self.gone and not (replica == 2 and clip in self.cached):
            return Prepared(f"r{replica}", clip, error="no file", cause="adapter")
        return Prepared(f"r{replica}", clip, f"i-{clip}", f"t-{clip}")


@pytest.fixture
def broadcast() -> DamagedBroadcast:
    return DamagedBroadcast()


@pytest.fixture
def protocol(ledger: Ledger, broadcast: Any) -> ReleaseProtocol:
    for number, (clip, vlm) in enumerate([(None, None), ("a", "v"), ("b", "v"), ("b", "w")], 1):
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="r", proposal_id=None)
    return ReleaseProtocol(ledger, broadcast, 2)


@pytest.fixture
def fallback(protocol: ReleaseProtocol) -> Fallback:
    return Fallback(protocol)


def reader(ledger: Ledger, broadcast: DamagedBroadcast, replica: int = 1) -> ResidencyReader:

    async def prepare(clip: str | None) -> Prepared:
        return broadcast.encoder(replica, clip)

    return ResidencyReader(lambda: read_residency(ledger, 2), prepare, broadcast.prepare)


@pytest.mark.parametrize(
    ("gone", "after"),
    [({"b"}, ("a", "w")), ({"w"}, ("b", "v")), ({"b", "a"}, (None, "w")), ({"b", "w"}, ("a", "v"))],
    ids=["clip", "vlm", "two clips", "both families"],
)
async def test_what_no_replica_can_load_is_taken_back_with_the_reason(
    fallback: Fallback, protocol: ReleaseProtocol, broadcast: DamagedBroadcast, ledger: Ledger, gone: set[str],
    after: tuple[str | None, str],
) -> None:  # fmt: skip
    await protocol.preparation.residency()  # the state of a started controller
    broadcast.gone = gone
    outcomes = []
    while (outcome := await fallback.step()) is not None:
        outcomes.append(outcome)
    live = ledger.live()
    assert live is not None and [outcome.number for outcome in outcomes] == list(range(5, live.number + 1))
    assert (live.clip, live.vlm) == after
    assert live.actor == "ratchet" and "cannot be loaded: no file" in live.reason
    assert broadcast.windows[-1][0] == live.number
    assert fallback.problem == ""


async def test_while_one_replica_can_load_it_nothing_is_taken_back(
    fallback: Fallback, broadcast: DamagedBroadcast
) -> None:
    broadcast.gone, broadcast.cached = {"b"}, {"b"}
    assert await fallback.step() is None


async def test_a_withdrawn_adapter_is_not_gone_back_to(
    fallback: Fallback, broadcast: DamagedBroadcast, ledger: Ledger
) -> None:
    ledger.withdraw(["a"], actor="guard", subject="release 2", reason="worse", evidence={})
    broadcast.gone = {"b"}
    outcome = await fallback.step()
    assert outcome is not None and outcome.clip is None


async def test_until_the_ledger_can_be_written_the_fallback_is_served_and_said(
    fallback: Fallback, protocol: ReleaseProtocol, broadcast: DamagedBroadcast, ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ledger.commit_release(5, clip="c", vlm="w", actor="t", reason="r", proposal_id=None)
    broadcast.gone = {"c"}

    def away(*_: object, **__: object) -> None:
        raise LedgerUnavailable("read only")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "propose", away)
        assert await protocol.start() is None  # the controller starts, and announces what can be served
        with pytest.raises(LedgerUnavailable):
            await fallback.step()
    assert broadcast.windows == [[4]]
    assert "c cannot be loaded" in fallback.problem
    for replica in (1, 2):
        residency = await reader(ledger, broadcast, replica).read()
        assert residency is not None and [row.release for row in residency.window] == [4]


async def test_the_base_needs_no_file_and_is_the_last_resort(fallback: Fallback, broadcast: DamagedBroadcast) -> None:
    broadcast.gone = {"a", "b", "v", "w"}
    first, second = await fallback.step(), await fallback.step()
    assert first is not None and (first.clip, first.family) == (None, "clip")
    assert second is not None and (second.vlm, second.family) == (None, "vlm")
    assert await fallback.step() is None


@pytest.mark.usefixtures("protocol")
async def test_an_ingress_falls_back_only_when_no_encoder_has_the_adapter(
    ledger: Ledger, broadcast: DamagedBroadcast
) -> None:
    broadcast.gone = broadcast.cached = {"b"}
    for replica in (1, 2):
        residency = await reader(ledger, broadcast, replica).read()
        assert residency is not None and residency.window[0].release == 4
    broadcast.cached = set()
    fresh = await reader(ledger, broadcast).read()
    assert fresh is not None
    # Both releases of the window have the adapter that is gone: what a rollback goes back to is served.
    assert [row.release for row in fresh.window] == [2]


@pytest.mark.usefixtures("protocol")
async def test_an_encoder_that_cannot_tell_now_is_no_reason_to_fall_back(ledger: Ledger) -> None:
    async def busy(clip: str | None) -> Prepared:
        return Prepared("r1", clip, error="no memory", cause="replica")

    async def all_busy(clip: str | None) -> list[Prepared]:
        return [await busy(clip)]

    with pytest.raises(ReleaseError, match="no memory"):
        await ResidencyReader(lambda: read_residency(ledger, 2), busy, all_busy).read()
