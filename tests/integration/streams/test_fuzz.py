"""Records mutated at every level: each is accounted for exactly once, and ingest never stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.fuzz_records import publish_mutated
from tests.support.kafka import make_topics, quarantined_places, reading, wait_for

pytestmark = pytest.mark.integration


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_any_bytes_end_as_a_sample_a_duplicate_a_tombstone_or_in_quarantine(
    broker: Broker, tmp_path: Path, count: int
) -> None:
    settings = broker.settings(tmp_path, ingest={"processes": 2})
    make_topics(settings)
    sent = publish_mutated(settings.kafka, count, seed=1)
    assert len(sent.records) + len(sent.refused) == count
    assert len(sent.records) > count * (0.9 if broker.embedded else 0.5)  # Apache Kafka refuses odd timestamps
    store = SampleStore(settings.lake)
    problems: set[str] = set()
    with reading(settings, lambda status: problems.add(status.problem)):
        wait_for(lambda: store.tally().total() > 0 and accounted(store) >= len(sent.records), "every record", 400)
        refusals = store.tally()["quarantine"]
        published = quarantined_places(settings.kafka, refusals)
    slow = f"the sample store {store.url} does not answer within"
    own = {problem for problem in problems if problem and slow not in problem}
    assert not own, "ingest was down, and not because this machine was busy"

    rows = store.records().to_pylist()
    kinds = {(row["partition"], row["offset"]): row["kind"] for row in rows}
    assert len(rows) == len(kinds), "a record was accounted for twice"
    assert kinds.keys() == sent.records.keys()
    stored = {row["id"]: (row["partition"], row["offset"]) for row in rows if row["kind"] == "sample"}
    assert sent.valid.items() <= stored.items(), "a valid record was not stored as what it is"
    reasons = {(row["partition"], row["offset"]): row["reason"] for row in rows}
    assert {position: reasons[position] for position in sent.corrupt} == dict.fromkeys(sent.corrupt, "corrupt")
    assert reasons and "internal" not in reasons.values(), "a fault of ours refused a record"

    refused = [(row["topic"], row["partition"], row["offset"]) for row in rows if row["kind"] == "quarantine"]
    assert sorted(published) == sorted(refused), "each refusal is in the quarantine topic once"


def accounted(store: SampleStore) -> int:
    """Records that have a row; a record that was corrected by another has a receipt."""
    tally = store.tally()
    return sum(tally[kind] for kind in ("sample", "duplicate", "quarantine", "tombstone", "deleted"))
