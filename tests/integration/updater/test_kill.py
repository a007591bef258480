"""``kill -9`` and SIGTERM of a real trainer process at critical points."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from tests.integration.updater.home import add_samples, make_home
from tests.integration.updater.mortal_trainer import SECONDS, start
from tests.support.kafka import wait_for
from updater.service.process import only_one
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration
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


def only_update(settings: Settings) -> UpdateRow:
    ledger = Ledger.open(settings.ledger)
    (update,) = ledger.updates()
    assert len(ledger.verdicts()) == int(update.state == "done")
    return update


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_killed_trainer_ends_in_the_same_adapter_and_is_charged_once(
    settings: Settings, undisturbed: UpdateRow, point: str
) -> None:
    killed = start(settings.home, point)
    assert killed.wait(SECONDS) == -signal.SIGKILL, killed.output()
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
