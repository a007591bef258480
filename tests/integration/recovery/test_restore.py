"""An installation that serves and ingests, restored elsewhere from a backup: same vectors and answers, and ingest
resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from core.artifacts import Artifacts
from core.loading import load_settings
from ops.recovery import back_up, restore
from ratchet_client.encoding import encode
from ratchet_client.records import Sample
from streams.store.sample_store import SampleStore
from tests.integration.serving.server_fixture import TEXTS, ServerFixture
from tests.support.broker import Broker, broker
from tests.support.kafka import Message, make_topics, picture, produce, reading, wait_for
from updater.bases.register import pull_base, push_base

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
__all__ = ["broker"]


def records(begin: int, end: int) -> list[Message]:
    encoded = [
        encode(Sample(image=picture(number), text=f"number {number}", domain="cats", source="zoo"), "raw")
        for number in range(begin, end)
    ]
    return [(record.value, list(record.headers)) for record in encoded]


def texts(server: ServerFixture) -> list[str]:
    return sorted(row["text"] for row in SampleStore(server.settings.lake).select("kind = 'sample'", ["text"]))


def is_searchable(server: ServerFixture, count: int) -> bool:
    with server.client() as client:
        catalog = client.status()["catalog"]
    return bool(catalog and catalog["corpus_rows"] >= count and catalog["coverage"] >= 1.0)


def answers(server: ServerFixture) -> dict[str, Any]:
    with server.client() as client:
        vectors = client.embed([*server.images, *TEXTS])
        return {
            "live": client.live(), "vectors": np.asarray(vectors),
            "classes": client.classify([server.images[0]], ["a cat", "a map"]),
            "hits": [(hit["id"], round(hit["score"], 5)) for hit in client.search(text=TEXTS[0], k=20)],
        }  # fmt: skip


def test_a_backup_of_a_running_installation_serves_the_same_elsewhere_and_ingest_goes_on(
    broker: Broker, tmp_path: Path
) -> None:
    here = ServerFixture.make(tmp_path / "here", encoder_replicas=1)
    kafka = broker.settings(tmp_path).kafka.model_dump(mode="json")
    here.configure(kafka=kafka, ingest={"processes": 1, "fresh_eval_share": 0.0})
    make_topics(here.settings)
    here.start()
    try:
        with reading(here.settings):
            produce(here.settings.kafka, records(0, 30))
            with here.client() as client:
                client.release(here.adapter(), reason="restored later")
            wait_for(lambda: len(texts(here)) == 30, "30 samples")
            push_base(here.settings.home, here.base.name, Artifacts(here.settings.artifacts))
            with here.traffic(rate=10) as traffic:  # requests and records go on meanwhile
                traffic.wait_for(5)
                produce(here.settings.kafka, records(30, 40))
                report = back_up(here.settings, str(tmp_path / "backup"), "test")
            assert traffic.report().failed == 0
            produce(here.settings.kafka, records(40, 50))  # the backup has none of these
            wait_for(lambda: len(texts(here)) == 50, "50 samples")
        here.until(lambda: is_searchable(here, 50))
        before = answers(here)
        produce(here.settings.kafka, records(50, 60))  # not read here
    finally:
        here.stop()

    there = restored(here, tmp_path)
    assert 30 <= len(texts(there)) <= 40 and report.release == before["live"]
    with reading(there.settings):
        wait_for(lambda: len(texts(there)) >= 60, "60 samples")
    assert texts(there) == sorted(f"number {index}" for index in range(60)), "none twice, and none is missing"
    there.start()
    try:
        there.until(lambda: is_searchable(there, 60))
        after = answers(there)
    finally:
        there.stop()
    np.testing.assert_array_equal(after["vectors"], before["vectors"])
    assert (after["live"], after["classes"]) == (before["live"], before["classes"])
    hits = dict(after["hits"])
    assert all(hits.get(sample, score) == score for sample, score in before["hits"])
    assert len(hits.keys() & dict(before["hits"]).keys()) >= 10, "of 20, beside ten samples that came after"


def restored(server: ServerFixture, folder: Path) -> ServerFixture:
    home = folder / "there"
    home.mkdir()
    config = home / "ratchet.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(server.config.read_text()) | {"home": str(home)}))
    settings = load_settings(config, environ={})
    restore(settings, str(folder / "backup"), "test")
    pull_base(home, server.base.name, settings.artifacts)
    return ServerFixture(settings, server.base, config)
