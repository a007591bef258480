"""`ratchet bench continual` with its real processes, on a tiny base and generated stand-ins for the demo domains."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.continual.chain import Unit
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.run_continual import Wanted, main, run
from benchmarks.continual.runner import Runner, failure
from benchmarks.continual.stream import ALL, HELD_OUT, REFERENCE, load_stream
from core.settings import Settings
from core.settings.serving import BaseModels
from demo.data.domain import RECEIPT, VERSION
from streams.publish.folders import FolderItem, read_folder, write_folder
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import COLOURS, picture

pytestmark = pytest.mark.integration
TWIN = "fluent3d"
PROTOCOL = Protocol(gflops=0.15, batch_size=6, new=12, reference=8, replay=8, items=8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    tiny_base(home)
    for number, domain in enumerate(sorted({source.domain for source in ALL})):
        folder = home / "data" / domain
        (folder / "images").mkdir(parents=True)
        rows = []
        for row in range(24):
            path = folder / "images" / f"{row}.png"
            # the last one of a suite is the picture of a pair of its domain that is trained on
            same = domain == TWIN and row == 23
            path.write_bytes(picture(1000 * number + (22 if same else row)))
            colour, split = COLOURS[row % 6], "test" if row % 2 else "train"
            concept = "common" if row in (1, 2) else f"{colour} {domain} {split}"
            rows.append(FolderItem(path, f"a {colour} {domain}", colour, concept, split, domain))
        write_folder(folder, rows)
        (folder / RECEIPT).write_text(json.dumps({"version": VERSION}))
    return Settings(home=home, base=BaseModels(clip="tiny"))


def _runner(settings: Settings, folder: Path, **options: Any) -> Runner:
    return Runner(settings.home, "tiny", folder, PROTOCOL, updates=2, jobs=2, **options)


def test_what_a_suite_asks_for_is_in_no_update_and_in_no_reference_pair(settings: Settings) -> None:
    """Stand-ins share a concept across domains, and one picture of a suite is also in a training pair of another."""
    stream = load_stream(settings.home, replace(PROTOCOL, items=100))
    concepts = {
        f"{source.domain}/{item.path.name}": item.concept
        for source in ALL
        for item in read_folder(settings.home / "data" / source.domain)
    }
    shared = {source.name for source in ALL if source.shared}
    of_suites = {concepts[pair.id] for suite in stream.suites if suite.name not in shared for pair in suite.items}
    taught = [pair for name, pairs in stream.updates.items() if name not in shared for pair in pairs]
    assert taught and stream.reference
    assert not of_suites & {concepts[pair.id] for pair in (*taught, *stream.reference)}
    ids = {pair.id for suite in stream.suites for pair in suite.items}
    tuned = {pair.id for suite in stream.tuning for pair in suite.items}
    taught_ids = {pair.id for pairs in (*stream.updates.values(), stream.reference) for pair in pairs}
    assert not tuned & (ids | taught_ids) and not ids & taught_ids
    assert stream.alike == {TWIN: 1}
    assert {suite.name for suite in stream.suites if suite.outside} == {
        source.name for source in HELD_OUT if source.domain not in REFERENCE
    }


@pytest.mark.long
def test_a_killed_worker_fails_its_unit_alone_and_goes_on_when_asked_again(settings: Settings, tmp_path: Path) -> None:
    victim, other = Unit("default"), Unit("naive")

    def kill() -> None:
        while not (pids := _workers(tmp_path, "default")):
            time.sleep(0.05)
        os.kill(pids[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert _runner(settings, tmp_path).run([victim, other])
    runner = _runner(settings, tmp_path)
    assert runner.done(other) == 2
    assert runner.done(victim) < 2
    assert "signal 9" in failure(tmp_path, victim)
    assert runner.run([victim, other])
    assert runner.done(victim) == 2
    assert failure(tmp_path, victim) == ""


def test_a_run_whose_time_is_over_stops_cleanly(settings: Settings, tmp_path: Path) -> None:
    assert not _runner(settings, tmp_path, deadline=time.monotonic() + 2).run([Unit("default")])
    assert _workers(tmp_path, "default") == []
    assert failure(tmp_path, Unit("default")) == ""


@pytest.mark.long
def test_a_method_that_the_budget_does_not_pay_for_is_reported(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Protocol(gflops=0.02, batch_size=6, new=12, reference=8, replay=8, items=8)
    found = run(settings, Wanted(methods=["full"], orders=1, seeds=1, updates=2, jobs=1), small)
    assert "does not pay for one step" in found["failed"]["full"]
    assert found["methods"] == {}
    with pytest.raises(SystemExit):
        main(settings, ["--help"])
    assert "--minutes" in capsys.readouterr().out


def _workers(folder: Path, method: str) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(folder) in command and method in command:
                found.append(int(process.name))
    return found
