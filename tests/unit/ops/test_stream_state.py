from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core import metrics
from core.addresses import free_port
from core.ledger import Ledger
from core.ledger import rows as t
from core.metrics import declared
from core.settings import Settings
from ops.stream_state import StreamState, stream_state
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
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
    held = [sample(0, 613, topic="t", split="held_train"), sample(0, 614, topic="t", split="held_fresh_eval")]
    put(made.store, [LOST, sample(0, 612, topic="t"), *held], Position("t", 0, 900))
    state = made.state()
    assert (state.lost, state.held) == (512, 2)
    assert state.samples == {"train": 1, "fresh_eval": 0, "held_train": 1, "held_fresh_eval": 1}
    assert (state.records, state.offsets) == (3, {"t:0": 900}), "markers and aborted records are offsets, not records"
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
