from __future__ import annotations

import pytest

from core.errors import LedgerUnavailable, ReleaseError
from core.ledger import Ledger
from serving.releases.auto_rollback import Fallback
from serving.releases.residency import read_residency
from serving.releases.types import Prepared, Residency
from serving.replicas.follower import ResidencyReader
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server


@pytest.fixture
def server(ledger: Ledger) -> Server:
    """Release 4 has b and w, release 3 b and v, release 2 a and v, release 1 the bases."""
    for number, (clip, vlm) in enumerate([(None, None), ("a", "v"), ("b", "v"), ("b", "w")], 1):
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="r", proposal_id=None)
    return Server(ledger)


async def residency_of_ingress(ledger: Ledger, broadcast: PlainBroadcast, replica: int) -> Residency:
    async def prepare(clip: str | None) -> Prepared:
        return broadcast.encoder(replica, clip)

    found = await ResidencyReader(lambda: read_residency(ledger, 2), prepare, broadcast.prepare).read()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("gone", "withdrawn", "after"),
    [
        ({"b"}, [], ("a", "w")), ({"w"}, [], ("b", "v")), ({"b", "a"}, [], (None, "w")), ({"b", "w"}, [], ("a", "v")),
        ({"a", "b", "v", "w"}, [], (None, None)), ({"b"}, ["a"], (None, "w")),
    ],
    ids=["clip", "vlm", "two clips", "both families", "all: a base needs no file", "the one behind was withdrawn"],
)  # fmt: skip
async def test_what_no_replica_can_load_is_taken_back_with_the_reason(
    server: Server, gone: set[str], withdrawn: list[str], after: tuple[str | None, str | None]
) -> None:
    if withdrawn:
        server.ledger.withdraw(withdrawn, actor="guard", subject="release 2", reason="worse", evidence={})
    fallback = Fallback(server)
    await server.preparation.residency()  # the state of a started controller
    server.broadcast.gone = gone
    outcomes = []
    while (outcome := await fallback.step()) is not None:
        outcomes.append(outcome)
    assert [outcome.number for outcome in outcomes] == list(range(5, server.live[0] + 1))
    assert server.live[1:] == after
    assert server.live_row.actor == "ratchet" and "cannot be loaded: no file" in server.live_row.reason
    assert server.broadcast.windows[-1][0] == server.live[0]
    assert fallback.problem == ""


async def test_until_the_ledger_is_back_the_fallback_is_served(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ledger.commit_release(5, clip="c", vlm="w", actor="t", reason="r", proposal_id=None)
    server.broadcast.gone = {"c"}
    fallback = Fallback(server)

    def away(*_: object, **__: object) -> None:
        raise LedgerUnavailable("read only")

    with monkeypatch.context() as patch:
        patch.setattr(server.ledger, "propose", away)
        assert await server.start() is None  # the controller starts, and announces what can be served
        with pytest.raises(LedgerUnavailable):
            await fallback.step()
    assert server.broadcast.windows == [[4]]
    assert "c cannot be loaded" in fallback.problem
    for replica in (1, 2):
        residency = await residency_of_ingress(server.ledger, server.broadcast, replica)
        assert [row.release for row in residency.window] == [4]


async def test_only_when_no_encoder_can_load_an_adapter_anything_falls_back(server: Server) -> None:
    told = server.broadcast
    told.gone = told.cached = {"b"}
    assert await Fallback(server).step() is None
    for replica in (1, 2):
        assert (await residency_of_ingress(server.ledger, told, replica)).window[0].release == 4
    told.cached = set()
    fresh = await residency_of_ingress(server.ledger, told, 1)
    # Both releases of the window have the adapter that is gone: what a rollback goes back to is served.
    assert [row.release for row in fresh.window] == [2]


async def test_an_encoder_that_cannot_tell_now_is_no_reason_to_fall_back(server: Server) -> None:
    async def busy(clip: str | None) -> Prepared:
        return Prepared("r1", clip, error="no memory", cause="replica")

    async def all_busy(clip: str | None) -> list[Prepared]:
        return [await busy(clip)]

    with pytest.raises(ReleaseError, match="no memory"):
        await ResidencyReader(lambda: read_residency(server.ledger, 2), busy, all_busy).read()
