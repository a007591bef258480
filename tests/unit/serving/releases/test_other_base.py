from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from core.artifacts import Artifacts
from core.errors import ConfigError, LedgerUnavailable, ReleaseError
from core.ledger import Ledger, ReleaseRow
from core.settings import Settings
from core.settings.serving import BaseModels, Rollout
from serving.app import _check_base
from serving.engines.clip_base import ClipBase
from serving.releases.guard import find_guard_target
from serving.releases.leadership import Lineage, spaces_of_bases
from serving.releases.residency import ResidencySource, encode_copy, read_residency, residency_path
from serving.releases.rollback import roll_back_offline
from tests.support.tiny import tiny_base
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import Server
from tests.unit.serving.releases.test_leadership import Controllers


class TwoBases:
    """A ledger in which release 1 is the old base alone, 2 its adapter "a", and 3 the adapter "n" of another base."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.old, self.new = tiny_base(home), tiny_base(home, "wide", seed=5, dim=48)
        self.ledger = Ledger.open(f"sqlite:///{home / 'ledger.db'}")
        for name, base in (("a", self.old), ("b", self.old), ("n", self.new), ("m", self.new)):
            self.ledger.register_adapter(
                name, family="clip", base=base.digest, image_space=f"i-{name}", text_space="t", meta={}
            )
        for number, clip in enumerate((None, "a"), start=1):
            self.ledger.commit_release(number, clip=clip, vlm=None, actor="t", reason="r", proposal_id=None)

    def change(self, base: ClipBase, clip: str | None, rollback: bool = False) -> ReleaseRow:
        live = self.ledger.live()
        assert live is not None
        live_base = live.clip_base or self.old.digest
        return self.ledger.change_base(
            live, clip=clip, base=base.digest, live_base=live_base, rollback=rollback, actor="ann", reason="r"
        )

    def settings(self, base: ClipBase) -> Settings:
        url = f"sqlite:///{self.home / 'ledger.db'}"
        return Settings(home=self.home, ledger_url=url, base=BaseModels(clip=base.name))

    def server(self, base: ClipBase) -> Server:
        return Server(self.ledger, lineage=Lineage.of(self.settings(base)))


@pytest.fixture
def bases(tmp_path: Path) -> TwoBases:
    return TwoBases(tmp_path)


async def test_a_server_of_the_old_base_goes_on_and_one_of_the_new_answers_with_the_new(bases: TwoBases) -> None:
    old, new = bases.server(bases.old), bases.server(bases.new)
    await old.start()
    assert old.broadcast.windows == [[2, 1]]
    bases.change(bases.new, "n")
    await old.follow()
    told = old.broadcast
    assert told.windows[-1] == [2, 1] and set(told.prepared) == {"a", None}, "nothing of the other base is loaded"
    await new.start()
    assert new.broadcast.windows == [[3]] and new.broadcast.prepared == ["n"]
    assert new.broadcast.indexed == [[3]], "a server cannot embed for another base"
    assert (await new.create(clip="m")).number == 4
    assert bases.ledger.release(4).clip_base == bases.new.digest
    assert (await new.back()).clip == "n"


async def test_what_is_live_is_changed_by_servers_of_its_base_alone(bases: TwoBases) -> None:
    old, new = bases.server(bases.old), bases.server(bases.new)
    await old.start()
    assert find_guard_target(bases.ledger, Rollout(), 0.0) is not None
    bases.change(bases.new, "n")
    assert find_guard_target(bases.ledger, Rollout(), 0.0) is None, "releases of two bases are not compared"
    words = r"release 3 has the base 'wide' \(.{12}\), and this server has 'tiny' \(.{12}\)"
    for refused in (old.back(), old.create(clip="b")):
        with pytest.raises(ReleaseError, match=words):
            await refused
    await new.start()
    with pytest.raises(ReleaseError, match="ratchet base switch") as named:
        await new.back(to=2)
    assert bases.old.digest[:12] in str(named.value) and bases.new.digest[:12] in str(named.value)
    with pytest.raises(ReleaseError, match="no release before 3 has another"):
        await new.back()
    with pytest.raises(ReleaseError, match="no release before 3"):
        roll_back_offline(bases.ledger, ["clip"], to=None, actor="ann", reason="r")
    with pytest.raises(ReleaseError, match="nothing can be promoted"):
        await new.promote_live()
    assert bases.ledger.live() == bases.ledger.release(3)


async def test_after_the_switch_back_the_old_servers_answer_with_it_and_both_indexes_stay(bases: TwoBases) -> None:
    bases.change(bases.new, "n")
    assert spaces_of_bases(bases.ledger, bases.home) == {"i-n", "i-a"}
    back = bases.change(bases.old, None, rollback=True)
    assert spaces_of_bases(bases.ledger, bases.home) == {"i-n", bases.old.spaces.image}
    old = bases.server(bases.old)
    await old.start()
    assert old.broadcast.windows == [[4, 2]] and back.clip_base == bases.old.digest
    outcome = await old.back()
    assert (outcome.number, outcome.clip) == (5, "a")


async def test_a_server_whose_base_was_never_released_says_so(bases: TwoBases) -> None:
    bases.change(bases.new, "n")
    third = tiny_base(bases.home, "third", seed=9)
    server, words = bases.server(third), r"has the base 'wide' .* this server has 'third'"
    with pytest.raises(ReleaseError, match=words):
        await server.start()
    assert server.broadcast.windows == []
    with pytest.raises(ConfigError, match=words):
        _check_base(bases.settings(third), bases.ledger)
    for base in (bases.old, bases.new):  # have releases to answer with
        _check_base(bases.settings(base), bases.ledger)


async def test_a_server_exports_that_another_base_is_live(bases: TwoBases, monkeypatch: pytest.MonkeyPatch) -> None:
    def exported() -> float | None:
        return REGISTRY.get_sample_value("ratchet_release_other_base")

    servers = Controllers(bases.settings(bases.old), monkeypatch)
    try:
        await servers.start()
        bases.change(bases.new, "n")
        await until(lambda: exported() == 1)
        bases.change(bases.old, "a", rollback=True)
        await until(lambda: exported() == 0)
    finally:
        servers.stop_all()


async def test_the_lease_goes_to_a_server_of_the_live_base(bases: TwoBases, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = Controllers(bases.settings(bases.old), monkeypatch)
    try:
        old = await servers.start()
        await until(lambda: old.lease.epoch is not None and old._started.is_set())
        bases.change(bases.new, "n")
        old.broadcast.broken["n"] = "does not fit"  # type: ignore[attr-defined]
        await until(lambda: old.lease.epoch is None and "'wide'" in old._last_error)
        servers._settings = bases.settings(bases.new)
        new = await servers.start()
        await until(lambda: new.lease.epoch is not None and new._started.is_set())
        update = bases.ledger.propose("update", clip="m", actor="updater", reason="passed")
        await until(lambda: bases.ledger.proposal(update.id).state == "committed")
        assert bases.ledger.live() == bases.ledger.release(4), "the old one took nothing back"
    finally:
        servers.stop_all()


def test_a_copy_of_the_residency_of_another_base_is_not_used(bases: TwoBases) -> None:
    bases.change(bases.new, "n")
    path = residency_path(bases.home)
    path.parent.mkdir(parents=True)
    path.write_bytes(encode_copy(read_residency(bases.ledger, 2, bases.new.digest), {}))
    away, artifacts = Ledger.lazy(f"sqlite:///{bases.home}/nowhere/ledger.db"), Artifacts(str(bases.home / "artifacts"))

    def source(base: ClipBase) -> ResidencySource:
        return ResidencySource(away, 2, path, artifacts, "test", lineage=Lineage.of(bases.settings(base)))

    assert [row.number for row in source(bases.new).newest().window] == [3]
    with pytest.raises(LedgerUnavailable):
        source(bases.old).newest()
