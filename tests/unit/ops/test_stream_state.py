from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from core import metrics
from core.addresses import free_port
from core.ledger import Ledger
from core.ledger import rows as t
from core.metrics import declared
from core.settings import Settings
from ops.cli.status import maintenance_line
from ops.console.app import build_console
from ops.stream_state import StreamState, stream_state
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.command_line import ratchet
from tests.support.samples import put, sample

LOST = {
    "kind": "gap", "topic": "t", "partition": 0, "offset": 100, "until": 612, "reason": "retention",
    "detail": "512 offsets", "ingested_at": datetime.now(UTC),
}  # fmt: skip


@pytest.fixture(scope="module")
def ports() -> tuple[int, int]:
    found = free_port(), free_port()
    metrics.listen("ingest", found[0])
    metrics.listen("maintain", found[1])
    return found


class Installation:
    def __init__(self, home: Path, ingest: int, maintain: int) -> None:
        away = {"base": {"vlm": ""}, "serve": {"port": 1}, "kafka": {"bootstrap": "127.0.0.1:1"}}
        ports = {"ingest": {"metrics_port": ingest}, "maintain": {"metrics_port": maintain}}
        self.settings = Settings.model_validate({"home": home, **away, **ports})
        self.store, self.ledger = SampleStore(self.settings.lake), Ledger.open(self.settings.ledger)

    def state(self) -> StreamState:
        return stream_state(self.settings, self.store, self.ledger)

    def request_deletion(self, name: str, age: timedelta) -> None:
        self.ledger.request_deletion(name, {"source": "cam"}, actor="ann", reason="r")
        with self.ledger.database.write() as session:
            session.get_one(t.DeletionRow, name).requested_at -= age


@pytest.fixture
def made(tmp_path: Path, ports: tuple[int, int]) -> Iterator[Installation]:
    here = Installation(tmp_path, *ports)
    yield here
    here.ledger.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    metrics.ingest.waiting("")
    yield
    metrics.ingest.waiting("")
    declared.MAINTAIN_LAST.clear()


def test_a_gap_is_a_problem_and_counts_are_those_of_the_positions(made: Installation) -> None:
    put(made.store, [LOST, sample(0, 612, topic="t")], Position("t", 0, 900))
    state = made.state()
    assert (state.lost, state.samples) == (512, {"train": 1, "fresh_eval": 0})
    assert (state.records, state.offsets) == (1, {"t:0": 900}), "markers and aborted records are offsets, not records"
    assert state.problems() == ["Records were lost before they were read: t:0 100..611 (retention)."]


def test_what_ingest_and_maintenance_do_is_read_from_their_metrics(made: Installation) -> None:
    assert made.state() == StreamState(waiting_for="", maintenance_known=True)
    metrics.maintain.ran("done", 1.0)
    state = made.state()
    assert state.maintained is not None and datetime.now(UTC) - state.maintained < timedelta(minutes=1)
    metrics.maintain.ran("failed", 1.0)
    assert "The last run of maintenance failed." in made.state().problems()
    metrics.maintain.ran("done", 1.0)
    metrics.ingest.quarantine_failing(True)
    [problem] = made.state().problems()
    assert "Refused records cannot be published" in problem
    metrics.ingest.quarantine_failing(False)
    assert made.state().problems() == []
    state = Installation(made.settings.home, free_port(), 0).state()
    assert (state.waiting_for, state.maintained, state.maintenance_known, state.problems()) == (None, None, False, [])


def test_deletions_that_wait_are_known_wherever_maintenance_runs(made: Installation) -> None:
    for number in range(3):
        made.request_deletion(f"d{number}", timedelta(hours=25 * number))
    made.ledger.deletion_removed("d1", samples=1, refusals=0, adapters={}, store_version=1)
    state = made.state()
    assert state.deletions == 3
    assert abs(state.oldest_deletion - timedelta(hours=50)) < timedelta(minutes=1)
    assert state.problems() == ["A deletion is not complete after a day."]
    for number in range(3):
        made.ledger.deletion_done(f"d{number}")
    state = made.state()
    assert (state.deletions, state.oldest_deletion, state.problems()) == (0, timedelta(0), [])


def test_the_line_about_maintenance_says_what_is_known() -> None:
    now = datetime.now(UTC)
    fails = {"maintenance_known": True, "maintenance_failing": True}
    for told, line in (
        ({}, ("maintenance: no metrics here", "dim")),
        ({"maintenance_known": True}, ("no maintenance yet", "dim")),
        (fails, ("maintenance fails", "red")),
        ({"maintained": now}, ("maintained 0 s ago", "")),
        ({**fails, "maintained": now - timedelta(seconds=90)}, ("maintained 90 s ago, failing since", "red")),
    ):
        assert maintenance_line(StreamState(**told)) == line  # type: ignore[arg-type]


def test_status_and_the_console_tell_the_same(made: Installation) -> None:
    put(made.store, [LOST], Position("t", 0, 612))
    metrics.ingest.waiting("store")
    metrics.dependency.state("store", "refused")
    metrics.maintain.ran("done", 1.0)
    made.request_deletion("d1", timedelta(hours=2))
    ports = [f"{name}.metrics_port={getattr(made.settings, name).metrics_port}" for name in ("ingest", "maintain")]
    words = [word for flag in ("serve.port=1", *ports) for word in ("--set", flag)]
    shown = " ".join(ratchet(made.settings.home, *words, "status", columns=200).output.split())
    for told in ("512 offsets lost, last: t:0 100..611 (retention)", "ingest waits for the store: refused",
                 "maintained", "deletions waiting: 1, the oldest for 2.0 h"):  # fmt: skip
        assert told in shown
    facts = json.loads(ratchet(made.settings.home, *words, "status", "--json").output)
    assert (facts["lost"], facts["waiting_for"], facts["gaps"][0]["first"]) == (512, "store", 100)
    with TestClient(build_console(made.settings), base_url="http://127.0.0.1:8001") as visitor:
        page = visitor.get("/").text
    problems = ("t:0 100..611 (retention)", "Ingest waits for the store: refused", "1 deletion is", "512 offsets were")
    for told in problems:
        assert told in page
    assert "Maintenance" not in page.split(), "it runs"
