from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError, StoreUnavailable
from core.ledger import Ledger
from serving.replicas import adapter_cache as module
from serving.replicas.adapter_cache import AdapterCache


@pytest.fixture
def cache(artifacts: Artifacts, tmp_path: Path) -> AdapterCache:
    return AdapterCache(artifacts, tmp_path / "cache")


def test_what_was_fetched_once_is_there_while_the_artifacts_are_gone(cache: AdapterCache, tmp_path: Path) -> None:
    path = cache.fetch("adapters/a")
    assert path.parent == tmp_path / "cache"
    shutil.rmtree(tmp_path / "artifacts")
    other = AdapterCache(Artifacts(str(tmp_path / "artifacts")), tmp_path / "cache")  # of another process
    assert (other.fetch("adapters/a") / "adapter_model.safetensors").read_bytes() == b"a" * 1000
    assert other.digests() == {"a": directory_digest(path)}
    with pytest.raises(AdapterError, match="not in"):
        other.fetch("adapters/b")


def test_a_damaged_copy_is_fetched_again(cache: AdapterCache) -> None:
    weights = cache.fetch("adapters/a") / "adapter_model.safetensors"
    weights.write_bytes(b"damaged")
    assert (cache.fetch("adapters/a") / "adapter_model.safetensors").read_bytes() == b"a" * 1000


def test_other_contents_than_those_that_were_released_are_refused(cache: AdapterCache) -> None:
    cache.fetch("adapters/a")
    cache.expect({"a": "0" * 64})
    with pytest.raises(AdapterError, match="other contents"):
        cache.fetch("adapters/a")


def test_contents_are_compared_with_the_digest_in_the_ledger_and_taken_while_that_is_away(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    right = directory_digest(artifacts.fetch("adapters/a"))
    for name, digest in (("a", right), ("b", "0" * 64)):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {}, digest=digest)
    cache = AdapterCache(artifacts, tmp_path / "cache", ledger)
    assert cache.fetch("adapters/a").is_dir()
    with pytest.raises(AdapterError, match="b has other contents in the artifacts than when it was recorded"):
        cache.fetch("adapters/b")
    assert cache.fetch("adapters/c").is_dir(), "the ledger does not know it"
    ledger.close()
    away = Ledger.lazy(f"sqlite:///{tmp_path}/no/such/folder.db?mode=ro&uri=true")
    assert AdapterCache(artifacts, tmp_path / "other", away).fetch("adapters/b").is_dir()


def test_artifacts_that_hang_fail_in_a_bounded_time_and_hold_one_thread(
    cache: AdapterCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_SECONDS", 0.02)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    release, before = threading.Event(), threading.active_count()
    monkeypatch.setattr(cache.artifacts, "fetch", lambda key: release.wait())
    for _ in range(5):
        with pytest.raises(StoreUnavailable, match="Bring the artifacts back"):
            cache.fetch("adapters/a")
    assert threading.active_count() <= before + 1
    release.set()


def test_after_a_failure_the_next_request_fails_at_once(cache: AdapterCache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def away(key: str) -> Path:
        calls.append(key)
        raise OSError("no route to host")

    monkeypatch.setattr(cache.artifacts, "fetch", away)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="no route"):
            cache.fetch("adapters/a")
    assert len(calls) == 1


def test_the_cache_is_bounded_and_what_is_resident_stays(artifacts: Artifacts, tmp_path: Path) -> None:
    cache = AdapterCache(artifacts, tmp_path / "cache", max_bytes=2000)
    cache.protect(["a", None])
    for name in ("a", "b", "c"):
        assert (cache.fetch(f"adapters/{name}") / "adapter_model.safetensors").is_file()
    assert set(cache.digests()) == {"a", "c"}
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["a", "a.sha256", "c", "c.sha256"]
