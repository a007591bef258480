"""Small runs of benchmarks: real workers and trainers, a real broker, real faults."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.backlog import run_backlog
from benchmarks.backlog.pairs import pair_rows
from benchmarks.continual.chain import Unit
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.runner import Runner, failure
from benchmarks.continual.stream import ALL, HELD_OUT, REFERENCE, load_stream
from benchmarks.search import run_search
from benchmarks.stream import chaos, ingest
from benchmarks.variety import run_variety
from core.loading import load_settings
from core.settings import Settings
from core.settings.serving import BaseModels
from demo.data.domain import RECEIPT, VERSION
from streams.publish.folders import FolderItem, read_folder, write_folder
from tests.integration.updater.home import make_home
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import COLOURS, picture

PROTOCOL = Protocol(gflops=0.15, batch_size=6, new=12, reference=8, replay=8, items=8)
TWIN = "fluent3d"


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.long
def test_ingest_is_measured_beside_a_bare_consumer(capsys: pytest.CaptureFixture[str]) -> None:
    small = ingest.Sizes(images=((20_000, 30),), rounds=1, stores=(200,), commits=2, writes=((2_000, 50, 10, 500),))
    figures = ingest.run(load_settings(environ={}), small)
    ingest.show(figures)
    assert last_line(capsys) == figures
    [size] = figures["throughput"]
    assert figures["ratio_to_bare"] == size["ratio_to_bare"] > 0
    names = ("records_per_second", "cpu_seconds")
    assert all(size[who][name] > 0 for who in ("fetch", "bare", "one", "two") for name in names)
    assert [each["stored"] for each in figures["growth"]] == [200]
    assert all(each["commit_seconds"] > 0 and each["start_seconds"] > 0 for each in figures["growth"])
    assert figures["memory_growth"] > 0
    assert 0 < figures["write_amplification"] < 5, "this counts bytes, not seconds"


@pytest.mark.long
def test_nothing_is_lost_or_stored_twice_while_workers_die_the_broker_goes_away_and_the_disk_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chaos.run(load_settings(environ={}), seconds=20, records=500, seed=7, folder=tmp_path)
    chaos.show(figures)
    assert last_line(capsys) == figures
    assert figures["produced"] == 500 and figures["drained"]
    assert {name: figures[name] for name in chaos.VIOLATIONS} == dict.fromkeys(chaos.VIOLATIONS, 0)
    assert figures["kills"] + figures["stops"] > 0 < figures["broker_cuts"]


@pytest.mark.long
def test_nothing_that_differs_is_lost_and_each_kind_is_learned_from(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run_variety.run(load_settings(environ={}), ["invoices", "one colour"], 40, ["CLIP", "InternVL"])
    run_variety.show(figures)
    assert last_line(capsys) == figures
    expected = {"kinds": 2, "lost": 0, "dropped_different": 0, "updates": 4, "updates_stuck": 0, "families_failed": 0}
    assert {name: figures[name] for name in expected} == expected, figures["problems"]
    shares = [0.0, figures["held_out_share_min"], figures["held_out_share_max"], 0.5]
    assert all(low <= high for low, high in pairwise(shares)) and shares[1] > 0


def test_an_update_that_dies_is_counted_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [([{"kind": "scans", "steps": 3}], "exit status -9: "), ([], "exit status -9: "), ([], "exit status 1: ")]
    monkeypatch.setattr(run_variety, "_lines", lambda command: told.pop(0))
    rows = run_variety.learn("CLIP", "nowhere", ["scans", "invoices", "panoramas"])
    assert [row["kind"] for row in rows] == ["scans", "invoices", "panoramas"]
    assert [row.get("stuck", False) for row in rows] == [False, True, True]


@pytest.mark.long
def test_a_small_search_compares_with_faiss(capsys: pytest.CaptureFixture[str]) -> None:
    run_search.main(Settings(), ["--rows", "3000", "--seconds", "0.2", "--index-rows", "1000"])
    figures = last_line(capsys)
    assert figures["recall"] >= 0.95 and figures["qps_to_faiss"] > 0
    for size in figures["growth"]:  # asked of the same queries, however many a busy machine had time for
        assert len({measured["recall"] for name, measured in size.items() if name.startswith("callers_")}) == 1
    assert [size["rows"] for size in figures["growth"]] == [30, 300, 3000]
    assert [size["index_used"] for size in figures["growth"]] == [False, False, True]
    assert figures["growth"][-1]["faiss"]["ef_search"] > 0
    assert {"recall_filtered", "ingest_rows_per_second", "backfill_rows_per_second", "memory_gib"} <= set(figures)


@pytest.mark.long
def test_every_pending_pair_is_visited_or_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = make_home(tmp_path / "home")
    train = pair_rows(settings.ingest.fresh_eval_share)("bench", 0, 300)[1]["train"]
    run_backlog.show(run_backlog.run(settings, pairs=300, updates=2))
    figures = last_line(capsys)
    assert (figures["updates"], figures["errors"], figures["problems"]) == (2, 0, [])
    first = figures["by_update"][0]
    assert (first["pending"], first["visited"]) == (train, 6 * 3)  # steps, and new rows of a batch
    assert figures["visited"] + figures["passed_over"] == figures["pending"] > train
    assert figures["first_step_seconds"] > 0 and 0.05 < figures["memory_gib"] < 4


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with stand-ins for the demo's domains. They share a concept, and the last picture of a suite is also that
    of a pair of its domain that is trained on.
    """
    home = tmp_path_factory.mktemp("home")
    tiny_base(home)
    for number, domain in enumerate(sorted({source.domain for source in ALL})):
        folder = home / "data" / domain
        (folder / "images").mkdir(parents=True)
        rows = []
        for row in range(24):
            path = folder / "images" / f"{row}.png"
            path.write_bytes(picture(1000 * number + (22 if domain == TWIN and row == 23 else row)))
            colour, split = COLOURS[row % 6], "test" if row % 2 else "train"
            concept = "common" if row in (1, 2) else f"{colour} {domain} {split}"
            rows.append(FolderItem(path, f"a {colour} {domain}", colour, concept, split, domain))
        write_folder(folder, rows)
        (folder / RECEIPT).write_text(json.dumps({"version": VERSION}))
    return Settings(home=home, base=BaseModels(clip="tiny"))


def runner(settings: Settings, folder: Path, **options: Any) -> Runner:
    return Runner(settings.home, "tiny", folder, PROTOCOL, updates=2, jobs=2, **options)


def workers(folder: Path, method: str) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"])
            if {str(folder), method} <= set(each.info["cmdline"] or ())]  # fmt: skip


def test_what_a_suite_asks_for_is_in_no_update_and_in_no_reference_pair(domains: Settings) -> None:
    stream = load_stream(domains.home, replace(PROTOCOL, items=100))
    concepts = {
        f"{source.domain}/{item.path.name}": item.concept
        for source in ALL
        for item in read_folder(domains.home / "data" / source.domain)
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
    outside = {source.name for source in HELD_OUT if source.domain not in REFERENCE}
    assert {suite.name for suite in stream.suites if suite.outside} == outside


@pytest.mark.long
def test_a_killed_worker_fails_its_unit_alone_and_goes_on_when_asked_again(domains: Settings, tmp_path: Path) -> None:
    victim, other = Unit("default"), Unit("naive")

    def kill() -> None:
        while not (found := workers(tmp_path, "default")):
            time.sleep(0.05)
        os.kill(found[0].pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert runner(domains, tmp_path).run([victim, other])
    made = runner(domains, tmp_path)
    assert made.done(other) == 2 > made.done(victim)
    assert "signal 9" in failure(tmp_path, victim)
    assert made.run([victim, other])
    assert made.done(victim) == 2 and failure(tmp_path, victim) == ""


def test_a_run_whose_time_is_over_stops_cleanly(domains: Settings, tmp_path: Path) -> None:
    assert not runner(domains, tmp_path, deadline=time.monotonic() + 2).run([Unit("default")])
    assert workers(tmp_path, "default") == []
    assert failure(tmp_path, Unit("default")) == ""
