"""Small runs of benchmarks: real workers and trainers, a real broker, real faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import ALL, HELD_OUT, REFERENCE, load_stream
from benchmarks.feedback import run_feedback
from benchmarks.stream import chaos, ingest
from core.loading import load_settings
from core.settings import Settings
from core.settings.serving import BaseModels
from demo.data.domain import RECEIPT, VERSION
from streams.publish.folders import FolderItem, read_folder, write_folder
from tests.support.tiny import tiny_base
from tests.unit.updater.builders import COLOURS, picture


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
@pytest.mark.timeout(1800)
def test_reports_are_learned_exactly_once_while_ingest_ingress_and_broker_die(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = run_feedback.run(Settings(home=tmp_path / "home"), tmp_path, ["learning"], run_feedback.QUICK)
    run_feedback.show(figures)
    assert last_line(capsys)["acknowledged"] == figures["stored"] > 0
    assert {name: figures[name] for name in ("failed", "mixed", "lost", "double")} == dict.fromkeys(
        ("failed", "mixed", "lost", "double"), 0
    )
    assert figures["learning"]["updates"] == 1 and figures["learning"]["verdicts"] != ["no verdict"]


PROTOCOL = Protocol(gflops=0.15, batch_size=6, new=12, reference=8, replay=8, items=8)


TWIN = "fluent3d"


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
