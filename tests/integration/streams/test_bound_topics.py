"""A topic that is bound to a source, beside the main one, into the same store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.ledger import Ledger
from streams.ingest.consumer import run_ingest
from streams.ingest.resubmit import resubmit
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.consumer import seen
from tests.support.kafka import good, make_topics, produce, reading, taken


def test_samples_have_the_source_of_their_topic_and_a_refused_record_goes_back_to_it(
    broker: Broker, tmp_path: Path
) -> None:
    settings = broker.settings(tmp_path)
    cameras = f"{settings.kafka.topic}.cameras"
    topics = [{"name": cameras, "source": "gate-7"}]
    settings = broker.settings(tmp_path, kafka={"topic": settings.kafka.topic, "topics": topics})
    bound = settings.model_copy(update={"kafka": settings.kafka.reading(cameras)})
    make_topics(settings)
    make_topics(bound)
    with reading(settings) as main, reading(bound) as other:
        with taken(main, 2):
            produce(settings.kafka, [good(1, source="gate-7"), good(2, source="shop")])
        with taken(other, 3):
            places = produce(bound.kafka, [good(3, source="shop"), good(2, source="shop"), (b"no picture", [])])
        store = SampleStore(settings.lake)
        seen(store, 5)
        rows = store.scan(columns=["text", "source", "topic"]).to_pylist()
        assert {(row["text"], row["source"], row["topic"] == cameras) for row in rows} == {
            ("picture 1", "claimed:gate-7", False), ("picture 2", "shop", False), ("picture 3", "gate-7", True),
        }  # fmt: skip
        topic, partition, offset = places[2]
        with closing(Ledger.open(settings.ledger)) as ledger, taken(other, 1):
            sent = resubmit(settings, ledger, f"{topic}:{partition}:{offset}", actor="ana", reason="again")
        assert sent.topic == cameras
    with pytest.raises(ConfigError, match="'elsewhere' is not bound to a source"):
        run_ingest(settings, "elsewhere")
