"""What replicas share: following the ledger, the health of forward passes, and the copies of adapters."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError, StoreUnavailable
from core.ledger import Ledger
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Cause, Prepared
from serving.replicas import adapter_cache, follower, forward_health
from serving.replicas.adapter_cache import AdapterCache
from serving.replicas.follower import ResidencyFollower, check_start
from serving.replicas.forward_health import MAX_FAILURES, ForwardHealth


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
        return [
            Prepared("r", name, error="no memory", cause=self.cause) if name in self.broken else Prepared("r", name)
            for name in needed
        ]

    def follower(self) -> ResidencyFollower:
        keep = lambda rows: self.kept.append(rows.window[0].number)  # noqa: E731
        return ResidencyFollower("encoder", self.read, self.load, keep)


async def test_what_answering_needs_is_loaded_the_stable_side_of_a_canary_too(ledger: Ledger, tmp_path: Path) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="canary", proposal_id=None, share=0.1)
    replica = Replica(ledger)
    await replica.follower().step()
    assert replica.loaded == ["a", None]
    rows = read_residency(Ledger.open(f"sqlite:///{tmp_path / 'empty.db'}"), 2)
    assert (rows.needed("clip"), rows.needed("vlm")) == ((None,), (None,)), "the base, before the first release"


async def test_a_replica_behind_is_unhealthy_unless_all_are(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.commit_release(2, clip="a", vlm=None, actor="t", reason="r", proposal_id=None)
    replica = Replica(ledger, broken={"a"})
    following, before = replica.follower(), asyncio.all_tasks()
    await following.step()
    await following.check()  # a lag that has just begun does not count
    monkeypatch.setattr(follower, "LAG_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match="no memory"):
        await following.check()
    for replica.cause in ("adapter", "storage"):
        await following.step()
        await following.check()
    (task,) = asyncio.all_tasks() - before  # which follows from the first check on
    task.cancel()


async def test_a_ledger_that_is_away_is_no_lag(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "LAG_SECONDS", -1.0)
    replica = Replica(ledger, away=True)
    following = replica.follower()
    await following.step()
    assert (replica.loaded, replica.kept) == ([], [])
    replica.away = False
    await following.step()
    assert (replica.loaded, replica.kept) == ([None], [1])
    replica.away = True
    await following.step()
    await following.check()


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
    with nullcontext() if starts else pytest.raises(RuntimeError, match="cannot be loaded"):
        check_start(answers, ["a"])


async def test_an_idle_replica_runs_a_pass_now_and_then_and_a_busy_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    health, run = ForwardHealth(), AsyncMock()
    await health.check(run, busy=False)
    assert run.await_count == 0  # it has just started
    monkeypatch.setattr(forward_health, "PROBE_SECONDS", 0.0)
    await health.check(run, busy=True)
    assert run.await_count == 0
    await health.check(run, busy=False)
    assert run.await_count == 1


async def test_failures_between_passes_that_work_are_those_of_the_requests() -> None:
    health, run = ForwardHealth(), AsyncMock()
    for _ in range(5):
        health.failed(ValueError("this request"))
        await health.check(run, busy=True)
    assert run.await_count == 5


async def test_a_lost_device_makes_unhealthy_at_once_and_for_good_and_a_lack_of_memory_does_not() -> None:
    health, run = ForwardHealth(), AsyncMock()
    health.failed(RuntimeError("CUDA error: out of memory"))
    await health.check(run, busy=False)
    assert run.await_count == 1
    health.failed(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
    health.succeeded()
    with pytest.raises(RuntimeError, match="does not work any more"):
        await health.check(run, busy=False)


async def test_a_busy_replica_whose_passes_never_end_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_health, "PROBE_LIMIT_SECONDS", 0.01)
    health, run = ForwardHealth(stall_seconds=0.0), AsyncMock()
    for _ in range(MAX_FAILURES + 1):
        await health.check(run, busy=True)
    assert run.await_count == MAX_FAILURES + 1
    for _ in range(MAX_FAILURES - 1):
        await health.check(asyncio.Event().wait, busy=True)
    with pytest.raises(RuntimeError, match="3 forward passes in a row failed: TimeoutError"):
        await health.check(asyncio.Event().wait, busy=True)


@pytest.fixture
def cache(artifacts: Artifacts, tmp_path: Path) -> AdapterCache:
    return AdapterCache(artifacts, tmp_path / "cache")


def weights(cache: AdapterCache, name: str = "a") -> Path:
    return cache.fetch(f"adapters/{name}") / "adapter_model.safetensors"


def test_what_was_fetched_once_is_there_while_the_artifacts_are_gone(cache: AdapterCache, tmp_path: Path) -> None:
    path = cache.fetch("adapters/a")
    assert path.parent == tmp_path / "cache"
    shutil.rmtree(tmp_path / "artifacts")
    other = AdapterCache(Artifacts(str(tmp_path / "artifacts")), tmp_path / "cache")  # of another process
    assert weights(other).read_bytes() == b"a" * 1000
    assert other.digests() == {"a": directory_digest(path)}
    with pytest.raises(AdapterError, match="not in"):
        other.fetch("adapters/b")


def test_a_damaged_copy_is_fetched_again_and_other_contents_are_refused(cache: AdapterCache) -> None:
    weights(cache).write_bytes(b"damaged")
    assert weights(cache).read_bytes() == b"a" * 1000
    cache.expect({"a": "0" * 64})
    with pytest.raises(AdapterError, match="other contents"):
        cache.fetch("adapters/a")


def test_contents_are_compared_with_the_digest_in_the_ledger_and_taken_while_that_is_away(
    artifacts: Artifacts, ledger: Ledger, tmp_path: Path
) -> None:
    right = directory_digest(artifacts.fetch("adapters/a"))
    for name, digest in (("a", right), ("b", "0" * 64)):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {}, digest=digest)
    cache = AdapterCache(artifacts, tmp_path / "cache", ledger)
    assert cache.fetch("adapters/a").is_dir()
    with pytest.raises(AdapterError, match="b has other contents in the artifacts than when it was recorded"):
        cache.fetch("adapters/b")
    assert cache.fetch("adapters/c").is_dir(), "the ledger does not know it"
    away = Ledger.lazy(f"sqlite:///{tmp_path}/no/such/folder.db?mode=ro&uri=true")
    assert AdapterCache(artifacts, tmp_path / "other", away).fetch("adapters/b").is_dir()


def test_hanging_artifacts_fail_soon_and_hold_one_thread(cache: AdapterCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_cache, "FETCH_SECONDS", 0.02)
    monkeypatch.setattr(adapter_cache, "RETRY_SECONDS", 0.0)
    release, before = threading.Event(), threading.active_count()
    monkeypatch.setattr(cache.artifacts, "fetch", lambda key: release.wait())
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="Bring the artifacts back"):
            cache.fetch("adapters/a")
    assert threading.active_count() <= before + 1
    release.set()


def test_after_a_failure_the_next_request_fails_at_once(cache: AdapterCache, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(cache.artifacts, "fetch", away)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="no route"):
            cache.fetch("adapters/a")
    assert away.call_count == 1


def test_the_cache_is_bounded_and_what_is_resident_stays(artifacts: Artifacts, tmp_path: Path) -> None:
    cache = AdapterCache(artifacts, tmp_path / "cache", max_bytes=2000)
    cache.protect(["a", None])
    for name in ("a", "b", "c"):
        assert weights(cache, name).is_file()
    assert set(cache.digests()) == {"a", "c"}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a", "a.sha256", "c", "c.sha256"]
