"""``kill -9`` of a real trainer process, at the places that matter; SIGTERM too."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ops.artifacts import Artifacts
from ops.ledger import Ledger, UpdateRow
from ops.settings import Settings
from tests.integration.updater.home import add_samples, make_home
from updater.process import only_one
from updater.service import UpdaterService

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
CHILD = """
import os, signal, sys
from pathlib import Path
from tests.integration.updater.home import make_home
from updater import command, learner, service

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

{hook}
command.run_update(make_home(Path(sys.argv[1])), once=True)
"""
AT_STEP_4 = """
real = learner.Learner.backward
count = 0
def backward(self, rows):
    global count
    count += 1
    if count == 1 + 4:  # the cost probe is the first
        die()
    return real(self, rows)
learner.Learner.backward = backward
"""
BEFORE_THE_ADAPTER_IS_STORED = "service.Artifacts.put_directory = die"
BEFORE_THE_ADAPTER_IS_RECORDED = "service.Ledger.register_adapter = die"
BEFORE_THE_STATE_IS_RECORDED = "service.Ledger.advance_update = die"
IN_THE_GATE = "from updater import judge; judge.run_gate = die"
BEFORE_THE_PROPOSAL = "service.UpdaterService._propose = die"
SLOW = """
import time
real = learner.Learner.backward
def backward(self, rows):
    time.sleep(0.3)
    return real(self, rows)
learner.Learner.backward = backward
"""


def trainer(home: Path, hook: str = "") -> subprocess.Popen[str]:
    """A trainer in a process of its own."""
    return start(CHILD.format(hook=hook), home)


def start(code: str, home: Path) -> subprocess.Popen[str]:
    """Some code in a process of its own, with a home folder as its argument."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(home)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int) -> str:
    """Its output, after it ended as expected."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == expected, output
    return output


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> UpdateRow:
    """The update that a trainer makes which nobody kills."""
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    settings = filled(home)
    finish(trainer(home), 0)
    return only_update(settings)


def filled(home: Path) -> Settings:
    settings = make_home(home)
    add_samples(settings, 12)
    add_samples(settings, 6, split="fresh_eval")
    return settings


def only_update(settings: Settings) -> UpdateRow:
    """The one update there is; it has one verdict once it is done."""
    ledger = Ledger.open(settings.ledger)
    (update,) = ledger.updates()
    assert len(ledger.verdicts()) == int(update.state == "done")
    return update


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(AT_STEP_4, id="in the middle of training"),
        pytest.param(BEFORE_THE_ADAPTER_IS_STORED, id="before the adapter is stored"),
        pytest.param(BEFORE_THE_ADAPTER_IS_RECORDED, id="between the adapter and the ledger"),
        pytest.param(BEFORE_THE_STATE_IS_RECORDED, id="between the adapter's row and the update's"),
        pytest.param(IN_THE_GATE, id="in the gate"),
        pytest.param(BEFORE_THE_PROPOSAL, id="between verdict and proposal"),
    ],
)
def test_a_killed_trainer_ends_in_the_same_adapter_and_is_charged_once(
    tmp_path: Path, undisturbed: UpdateRow, hook: str
) -> None:
    settings = filled(tmp_path / "home")
    finish(trainer(settings.home, hook), -signal.SIGKILL)
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
    tmp_path: Path, undisturbed: UpdateRow, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = filled(tmp_path / "home")
    process = trainer(settings.home, SLOW)
    update_dir = settings.home / "updates"
    while not list(update_dir.glob("*/checkpoint.safetensors")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "goes on from its checkpoint next time" in finish(process, 0)
    assert only_update(settings).state == "training"
    UpdaterService(settings).step()
    assert "training goes on at step" in capfd.readouterr().err
    assert only_update(settings).adapter == undisturbed.adapter


def test_a_second_trainer_waits_for_the_first(tmp_path: Path) -> None:
    settings = filled(tmp_path / "home")
    with only_one(settings.home):
        second = trainer(settings.home)
        assert second.stdout is not None
        assert "another updater works" in second.stdout.readline()
        assert second.poll() is None
        assert not (settings.home / "updates").exists()
    finish(second, 0)
    assert only_update(settings).state == "done"
