from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from updater.service import process
from updater.service.process import ThrottledLog

SCRIPT = """
import os, sys
from pathlib import Path
from updater.service.process import be_nice
be_nice()
group = Path("/proc/self/autogroup")
print(os.nice(0), group.read_text().split()[-1] if group.exists() else "none")
"""


def python(script: str, *arguments: str, **how: Any) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, **how)
    return done.returncode, done.stdout, done.stderr


def test_the_trainer_is_nice_as_a_process_and_as_a_session() -> None:
    code, said, error = python(SCRIPT, start_new_session=True)
    assert code == 0, error
    assert said.split() == ["19", "19" if Path("/proc/self/autogroup").exists() else "none"]


EARLY = """
import sys
from updater.service import process
process.be_nice = lambda *_: sys.exit("too late" if "torch" in sys.modules else 0)
from ops.cli.main import main
main()
"""


def test_ratchet_update_gives_way_before_it_imports_what_takes_seconds(tmp_path: Path) -> None:
    assert python(EARLY, "--set", f"home={tmp_path}", "trainer") == (0, "", "")


ENDS = """
import atexit, os, signal
from updater.service.process import StopSignal

def asked_again() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    print("cleaned up", flush=True)

atexit.register(asked_again)
StopSignal().install()
os.kill(os.getpid(), signal.SIGTERM)
print("went on", flush=True)
"""


def test_a_second_signal_does_not_break_off_what_the_first_one_ends() -> None:
    assert python(ENDS) == (0, "cleaned up\n", "")


def test_a_reason_to_wait_is_not_said_again_for_other_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = ThrottledLog()
    for reason in (
        "2 samples wait for 6 s",
        "2 samples wait for 20 s",
        "the budget lacks 5,994",
        "the budget lacks 812",
    ):
        waits.say(reason)
    monkeypatch.setattr(process, "QUIET_SECONDS", -1.0)
    waits.say("the budget lacks 7")
    said = [line.partition("waits: ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["2 samples wait for 6 s", "the budget lacks 5,994", "the budget lacks 7"]
