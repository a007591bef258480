from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from core.artifacts import Artifacts
from core.dependencies import current
from core.errors import LedgerUnavailable, ReleaseError
from core.ledger import Ledger
from serving.releases import residency as module
from serving.releases.auto_rollback import Fallback
from serving.releases.residency import KEY, MAX_BYTES, ResidencySource, decode_copy, read_residency
from serving.releases.types import Prepared, Residency
from serving.replicas.follower import ResidencyReader
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server


class Node:
    """The stores of one server, and a source for each start of a replica."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}")
        self.artifacts = Artifacts(str(folder / "artifacts"))
        self.file = folder / "home" / "serving" / "residency.json"
        self.release(1, None)
        self.release(2, "clip-a")

    def release(self, number: int, clip: str | None) -> None:
        self.ledger.commit_release(number, clip=clip, vlm=None, actor="t", reason="r", proposal_id=None)

    def source(self, ledger: Ledger | None = None) -> ResidencySource:
        return ResidencySource(
            ledger or Ledger.lazy(f"sqlite:///{self.folder / 'nowhere' / 'ledger.db'}"), 2, self.file, self.artifacts,
            "encoder", lambda: {"clip-a": "a" * 64, "clip-other": "b" * 64},
        )  # fmt: skip

    def keep(self) -> None:
        source = self.source(self.ledger)
        source.keep(source.read())


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_without_a_copy_the_outage_is_an_error_with_its_fix_and_the_state_of_the_ledger(node: Node) -> None:
    with pytest.raises(LedgerUnavailable, match="Bring the ledger back"):
        node.source().newest()
    assert current()["ledger"].state == "away"
    node.source(node.ledger).read()
    assert current()["ledger"].state == "ok"


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'"number": 2', b'"number": 3'), (b'"format": 1', b'"format": 2'), (b"}", b""), (b'"residency"', b'"other"')],
)
def test_a_copy_that_was_changed_or_cut_short_is_not_used(node: Node, before: bytes, after: bytes) -> None:
    node.keep()
    node.artifacts.write_bytes(KEY, node.file.read_bytes().replace(before, after))
    node.file.write_bytes(node.file.read_bytes()[:-10])
    with pytest.raises(LedgerUnavailable, match="no copy"):
        node.source().newest()


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, b" " * (MAX_BYTES + 1)])
def test_any_bytes_end_as_an_error(data: bytes) -> None:
    with pytest.raises(ReleaseError, match="cannot be used"):
        decode_copy(data)


def test_while_the_ledger_is_away_a_start_takes_the_newest_whole_copy_of_node_and_artifacts(node: Node) -> None:
    def newest() -> tuple[list[int], str | None]:
        source = node.source()
        rows = source.newest()
        assert source.adapters == {"clip-a": "a" * 64}
        return [row.number for row in rows.window], source.source

    node.keep()
    older = node.file.read_bytes()
    assert node.source().newest() == node.source(node.ledger).read()
    node.file.write_bytes(older[:-10])
    assert newest() == ([2, 1], "artifacts"), "that of the node is damaged"
    node.release(3, "clip-b")
    node.keep()
    node.file.write_bytes(older)
    assert newest() == ([3, 2], "artifacts")
    node.file.write_bytes(older)
    shutil.rmtree(node.folder / "artifacts")
    assert newest() == ([2, 1], "file")


def test_a_ledger_that_hangs_takes_one_thread_and_counts_again_later(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.keep()
    node.release(3, "clip-b")
    monkeypatch.setattr(module, "LEDGER_SECONDS", 0.02)
    let_go, before, releases = threading.Event(), threading.active_count(), node.ledger.releases
    monkeypatch.setattr(node.ledger, "releases", lambda *which: let_go.wait() and releases(*which))
    source = node.source(node.ledger)
    for _ in range(5):
        with pytest.raises(LedgerUnavailable, match="does not answer"):
            source.read()
    assert threading.active_count() <= before + 1
    assert (source.newest().window[0].number, source.source) == (2, "file")
    let_go.set()
    source._read_ledger._seconds = 60.0
    assert (source.newest().window[0].number, source.source) == (3, "ledger")


def test_copies_follow_what_is_live_also_after_an_overwrite(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)
    source = node.source(node.ledger)
    source.keep(source.read())
    older = node.file.read_bytes()
    node.release(3, "clip-b")
    for _ in range(2):
        source.keep(source.read())
        for data in (node.file.read_bytes(), node.artifacts.read_bytes(KEY)):
            assert decode_copy(data)[0].window[0].number == 3
        node.file.write_bytes(older)  # by a process that is behind
        node.artifacts.write_bytes(KEY, older)


def test_copies_that_cannot_be_written_do_not_stop_a_replica(node: Node, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    (tmp_path / "artifacts").write_text("no folder")
    node.keep()
    assert not node.file.exists()


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
