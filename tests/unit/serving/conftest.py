from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger
from tests.unit.serving.auth_app import AuthApp, Keys
from tests.unit.serving.catalog_world import World


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    ledger = Ledger.open(f"sqlite:///{tmp_path_factory.mktemp('auth_app') / 'ledger.db'}")
    yield Keys(ledger)
    ledger.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow slow ledger reads: a busy machine may take longer than a server waits."""
    monkeypatch.setattr("serving.http.auth.READ_SECONDS", 60.0)
    monkeypatch.setattr("serving.releases.rollback.ANSWER_SECONDS", 60.0)


@pytest.fixture
def closed(keys: Keys, tmp_path: Path) -> AuthApp:
    return AuthApp(keys.ledger, tmp_path)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """Have adapters a to f, of 1,000 bytes each."""
    made = Artifacts(str(tmp_path / "artifacts"))
    for name in "abcdef":
        folder = tmp_path / "made" / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(name.encode() * 1000)
        made.put_directory(folder, f"adapters/{name}")
    return made


@pytest.fixture
def catalog(tmp_path: Path) -> World:
    return World(tmp_path)
