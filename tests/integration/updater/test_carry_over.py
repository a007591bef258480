"""The memory that an update leaves for the next one: stored with its adapter, passed on, and the same after a kill."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, commit, judged_as, made_by, make_home, release
from tests.integration.updater.mortal_trainer import SECONDS, start
from tests.unit.updater.builders import recipe
from updater.adapters import read_delta
from updater.service import train_update
from updater.service.update_loop import UpdaterService
from updater.training.checkpoint import CarryOver

pytestmark = pytest.mark.integration


def remembering(home: Path) -> Settings:
    """A home whose updates each continue from the last trained adapter, which is not the served one."""
    settings = make_home(home)
    plan = recipe("finetuned-merge", max_steps=6, reference_limit=20)
    (home / "default.yaml").write_text(plan.to_yaml())
    add_samples(settings, 12)
    return settings


def memory_of(settings: Settings, update: UpdateRow) -> CarryOver:
    return CarryOver.read(Artifacts(settings.artifacts).fetch(f"memories/{update.adapter}"))


def last(settings: Settings) -> UpdateRow:
    return Ledger.open(settings.ledger).updates()[0]


def killed_and_continued(settings: Settings, point: str) -> UpdateRow:
    killed = start(settings.home, point)
    assert killed.wait(SECONDS) == -signal.SIGKILL, killed.output()
    assert last(settings).state == "training"
    UpdaterService(settings).step()
    return last(settings)


@pytest.fixture(autouse=True)
def passed(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as("passed", monkeypatch)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    seen: list[Path | None] = []
    real = train_update.train

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(options["carry_over"])
        return real(*arguments, **options)

    monkeypatch.setattr(train_update, "train", watched)
    return seen


def test_the_next_update_is_given_what_the_incumbents_one_left(tmp_path: Path, given: list[Path | None]) -> None:
    settings = remembering(tmp_path / "home")
    service = UpdaterService(settings)
    first = made_by(service)
    kept = memory_of(settings, first)
    artifacts = Artifacts(settings.artifacts)
    served = read_delta(artifacts.fetch(f"adapters/{first.adapter}"), load_base(settings.home, "tiny"))
    assert set(kept.start) == set(served)
    assert all(
        2 * float(part.dense().norm()) == pytest.approx(float(kept.start[name].dense().norm()), rel=1e-4)  # type: ignore[union-attr]
        for name, part in served.items()
    ), "half of what was trained is served, and all of it is remembered"
    release(service.ledger)
    add_samples(settings, 12)
    second = made_by(service)
    assert given == [None, artifacts.fetch(f"memories/{first.adapter}")]
    assert memory_of(settings, second).digest != kept.digest
    release(service.ledger)
    commit(service.ledger, clip=first.adapter)
    add_samples(settings, 12)
    service.step()
    assert given[2] == given[1], "after a rollback, it is the memory of what is live"


@pytest.mark.long
def test_a_trainer_killed_before_its_memory_is_stored_stores_it_the_next_time(tmp_path: Path) -> None:
    undisturbed, settings = remembering(tmp_path / "undisturbed"), remembering(tmp_path / "home")
    one = made_by(UpdaterService(undisturbed))
    other = killed_and_continued(settings, "before the memory is stored")
    assert other.adapter == one.adapter
    assert memory_of(settings, other).digest == memory_of(undisturbed, one).digest


def test_an_update_that_starts_from_a_memory_ends_alike_when_it_is_killed(tmp_path: Path) -> None:
    undisturbed = remembering(tmp_path / "undisturbed")
    service = UpdaterService(undisturbed)
    service.step()
    release(service.ledger)
    add_samples(undisturbed, 12)
    service.ledger.close()
    shutil.copytree(undisturbed.home, tmp_path / "home")
    settings = make_home(tmp_path / "home")
    one = made_by(UpdaterService(undisturbed))
    other = killed_and_continued(settings, "in the middle of training")
    assert (other.id, other.state, other.adapter) == (one.id, "done", one.adapter)
    assert memory_of(settings, other).digest == memory_of(undisturbed, one).digest
