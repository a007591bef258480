"""``kill -9`` and SIGTERM of a real trainer process at critical points; the memory that an update leaves for the next
one: stored with its adapter, passed on, and the same after a kill.
"""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, commit, judged_as, made_by, make_home, release
from tests.integration.updater.mortal_trainer import SECONDS, start
from tests.support.kafka import wait_for
from tests.unit.updater.builders import recipe
from updater.adapters import read_delta
from updater.service import train_update
from updater.service.process import only_one
from updater.service.update_loop import UpdaterService
from updater.training.checkpoint import CarryOver

KILLED_AT = (
    "in the middle of training", "before the adapter is stored", "between the adapter and the ledger",
    "between the adapter's row and the update's", "in the gate", "between verdict and proposal",
)  # fmt: skip


def filled(home: Path) -> Settings:
    settings = make_home(home)
    add_samples(settings, 12)
    add_samples(settings, 6, split="fresh_eval")
    return settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return filled(tmp_path / "home")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> UpdateRow:
    """The update of a trainer that is not killed."""
    settings = filled(tmp_path_factory.mktemp("undisturbed") / "home")
    assert start(settings.home).wait(SECONDS) == 0
    return only_update(settings)


def killed(settings: Settings, point: str) -> None:
    process = start(settings.home, point)
    assert process.wait(SECONDS) == -signal.SIGKILL, process.output()


def only_update(settings: Settings) -> UpdateRow:
    ledger = Ledger.open(settings.ledger)
    (update,) = ledger.updates()
    assert len(ledger.verdicts()) == int(update.state == "done")
    return update


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_killed_trainer_ends_in_the_same_adapter_and_is_charged_once(
    settings: Settings, undisturbed: UpdateRow, point: str
) -> None:
    killed(settings, point)
    ledger = Ledger.open(settings.ledger)
    left = ledger.unfinished_update("clip")
    assert left is not None
    assert ledger.spent() == ledger.spent(left.id) > 0
    UpdaterService(settings).step()
    update = only_update(settings)
    assert (update.id, update.state, update.adapter) == (undisturbed.id, "done", undisturbed.adapter)
    assert update.cost["gflops_spent"] == undisturbed.cost["gflops_spent"]
    assert ledger.spent() == pytest.approx(update.cost["gflops_spent"])
    assert ledger.adapter(str(update.adapter)).name == update.adapter
    stored = {path.name for path in Path(settings.artifacts, "adapters").iterdir() if not path.name.startswith(".")}
    assert stored == {update.adapter}
    assert Artifacts(settings.artifacts).exists(f"reports/{update.id}/report.html")


def test_sigterm_ends_training_with_a_checkpoint(
    settings: Settings, undisturbed: UpdateRow, capfd: pytest.CaptureFixture[str]
) -> None:
    process = start(settings.home, "nowhere, but slowly")
    while not list((settings.home / "updates").glob("*/checkpoint.safetensors")):
        assert process.poll() is None, process.output()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0, process.output()
    assert "goes on from its checkpoint next time" in process.output()
    assert only_update(settings).state == "training"
    UpdaterService(settings).step()
    assert "training goes on at step" in capfd.readouterr().err
    assert only_update(settings).adapter == undisturbed.adapter


def test_a_second_trainer_waits_for_the_first(settings: Settings) -> None:
    with only_one(settings.home):
        second = start(settings.home)
        wait_for(lambda: "another updater works" in second.output(), "its word")
        assert second.poll() is None
        assert not (settings.home / "updates").exists()
    assert second.wait(SECONDS) == 0, second.output()
    assert only_update(settings).state == "done"


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
    killed(settings, point)
    assert last(settings).state == "training"
    UpdaterService(settings).step()
    return last(settings)


@pytest.fixture
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


@pytest.mark.usefixtures("passed")
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


@pytest.mark.usefixtures("passed")
@pytest.mark.long
def test_a_trainer_killed_before_its_memory_is_stored_stores_it_the_next_time(tmp_path: Path) -> None:
    undisturbed, settings = remembering(tmp_path / "undisturbed"), remembering(tmp_path / "home")
    one = made_by(UpdaterService(undisturbed))
    other = killed_and_continued(settings, "before the memory is stored")
    assert other.adapter == one.adapter
    assert memory_of(settings, other).digest == memory_of(undisturbed, one).digest


@pytest.mark.usefixtures("passed")
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
