"""The examples of producers, against a broker and an ingest."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, picture, produce, reading, taken
from tests.support.pages import ROOT

PRODUCERS = ROOT / "examples" / "producers"
PICTURES = ROOT / "examples" / "suite" / "pictures"
CONNECT = PRODUCERS / "kafka-connect"
KCAT = """#!{python}
import argparse, sys
from pathlib import Path
from confluent_kafka import Producer
parser = argparse.ArgumentParser()
parser.add_argument("-P", action="store_true", required=True)
for flag in "bt":
    parser.add_argument("-" + flag, required=True)
parser.add_argument("-H", dest="headers", action="append", default=[])
parser.add_argument("files", nargs="*", type=Path)
given, failed = parser.parse_args(), []
producer, headers = Producer({{"bootstrap.servers": given.b}}), [tuple(each.split("=", 1)) for each in given.headers]
for value in [path.read_bytes() for path in given.files] or sys.stdin.buffer.read().splitlines():
    producer.produce(given.t, value, headers=headers, on_delivery=lambda error, _: error and failed.append(str(error)))
producer.flush()
sys.exit("; ".join(failed) or None)
"""
"""The part of kcat that the example uses. With a librdkafka before 2.3 (Debian 12 has 2.0.2) kcat gives up on the
embedded broker's answer to ApiVersions with "Read underflow"; no option helps.
"""
Take = Callable[[int, Callable[[], object]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def settings(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    own = broker.settings(tmp_path_factory.mktemp("examples"))
    make_topics(own)
    return own


@pytest.fixture(scope="module")
def take(settings: Settings) -> Iterator[Take]:
    store = SampleStore(settings.lake)
    with reading(settings) as ingest:

        def rows_of(count: int, send: Callable[[], object]) -> list[dict[str, Any]]:
            before = set(store.scan()["id"].to_pylist())
            with taken(ingest, count):
                send()
            return [row for row in store.scan().to_pylist() if row["id"] not in before]

        yield rows_of


def run(settings: Settings, *command: str | Path) -> str:
    kafka = settings.kafka
    named = {"RATCHET_KAFKA__BOOTSTRAP": kafka.bootstrap, "RATCHET_KAFKA__TOPIC": kafka.topic}
    done = subprocess.run(
        [*map(str, command)], env={**os.environ, **named}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def properties(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def test_python(settings: Settings, take: Take) -> None:
    told: list[str] = []
    rows = take(
        12, lambda: told.append(run(settings, sys.executable, PRODUCERS / "producer.py", PICTURES / "data.csv"))
    )
    assert {row["text"] for row in rows} >= {"a red circle", "a blue bar"}
    assert (len(rows), {row["domain"] for row in rows}) == (12, {"examples"})
    assert len(told[0].splitlines()) == 12


def test_kcat(settings: Settings, take: Take, tmp_path: Path) -> None:
    image = tmp_path / "bus.png"
    image.write_bytes(picture(7))
    program = tmp_path / "kcat"
    program.write_text(KCAT.format(python=sys.executable))
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    rows = take(2, lambda: run(settings, "env", f"PATH={path}", "bash", PRODUCERS / "kcat.sh", image, 'a "red" bus'))
    assert {row["text"] for row in rows} == {'a "red" bus', 'a "red" bus, as it is'}
    assert {row["domain"] for row in rows} == {"examples"}


def test_kafka_connect(settings: Settings, take: Take) -> None:
    """Uses the output of its JsonConverter for a row of the query: Kafka Connect itself is not run."""
    worker, connector = properties(CONNECT / "worker.properties"), properties(CONNECT / "products.properties")
    assert worker["value.converter"] == "org.apache.kafka.connect.json.JsonConverter"
    assert worker["value.converter.schemas.enable"] == "true"
    assert int(worker["producer.max.request.size"]) >= settings.ingest.max_image_bytes * 4 // 3 + 100_000
    assert worker["bootstrap.servers"] == Settings().kafka.bootstrap
    assert re.fullmatch(r"\$\{file:[^:]+:\w+\}", connector["connection.password"])
    assert "file" in worker["config.providers"].split(",")
    assert worker["config.providers.file.class"] == "org.apache.kafka.common.config.provider.FileConfigProvider"
    assert connector["topic.prefix"] == Settings().kafka.topic  # with a query the prefix is the whole topic
    selected = connector["query"].partition("(SELECT ")[2].partition(" FROM products)")[0]
    columns = [each.split(" AS ")[-1].strip() for each in selected.split(",")]
    values = {"id": 41, "image": base64.b64encode(picture(8)).decode(), "text": "a kettle", "label": None}
    values["domain"] = "shop"
    assert columns == list(values)
    types = {"id": "int32", "image": "bytes"}
    fields = [{"type": types.get(name, "string"), "optional": True, "field": name} for name in columns]
    record = {"schema": {"type": "struct", "fields": fields, "optional": False}, "payload": values}
    [row] = take(1, lambda: produce(settings.kafka, [(json.dumps(record).encode(), [])]))
    assert (row["text"], row["domain"], row["image"]) == ("a kettle", "shop", picture(8))
    assert json.loads(row["extra"]) == {"id": 41}
