"""The client's wheel alone in a new environment: it sends a record, and a search with it finds that record.

Uses the server of the other tests, which finds in its lake what an ingest of this module has stored.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.settings.streams import Kafka
from tests.integration.serving.server_fixture import ServerFixture
from tests.support.broker import Broker, broker
from tests.support.kafka import make_topics, picture, reading
from tests.support.pages import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
__all__ = ["broker"]
MAX_BYTES = 30_000_000
UV = Path(sys.executable).with_name("uv")
#: Publishes one sample, and asks until a search finds it: the same by the plain and by the asynchronous classes.
SCRIPT = """
import asyncio, json, sys, time
from ratchet_client import AsyncClient, AsyncProducer, Client, Producer

bootstrap, topic, url, *pictures = sys.argv[1:]
images = [open(path, "rb").read() for path in pictures]
with Producer(bootstrap, topic) as producer, Client(url) as client:
    sent = producer.send(image=images[0], text="a lonely lighthouse", domain="coast")
    producer.flush()
    while not (hits := client.search("a lonely lighthouse", domain=["coast"])):
        time.sleep(0.1)

async def same():
    async with AsyncProducer(bootstrap, topic) as producer, AsyncClient(url) as client:
        delivery = await (await producer.send(image=images[1], text="a busy harbour", domain="port"))
        while not (hits := await client.search("a busy harbour", domain=["port"])):
            await asyncio.sleep(0.1)
        return delivery.sample_id, hits[0]["id"]

names = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
print(json.dumps([[sent.result().sample_id, hits[0]["id"]], asyncio.run(same()), sorted(names)]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    shutil.copytree(ROOT / "client", folder / "client", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    for command in (
        ["build", "--wheel", "-q", "--out-dir", folder, folder / "client"],
        ["venv", "-q", "--python", sys.executable, folder / "venv"],
    ):
        subprocess.run([UV, *command], check=True, timeout=300)
    [wheel] = folder.glob("ratchet_client-*.whl")
    made = folder / "venv" / "bin" / "python"
    subprocess.run([UV, "pip", "install", "-q", "--python", made, wheel], check=True, timeout=300)
    return made


@pytest.fixture
def kafka(server: ServerFixture, broker: Broker) -> Iterator[Kafka]:
    made = broker.settings(server.settings.home, ingest={"fresh_eval_share": 0.0})
    settings = server.settings.model_copy(update={"kafka": made.kafka, "ingest": made.ingest})
    make_topics(settings)
    with reading(settings):
        yield settings.kafka


def test_it_is_small_and_brings_nothing_of_the_server(python: Path) -> None:
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert size < MAX_BYTES
    assert (packages / "ratchet_client" / "py.typed").is_file()
    assert not {"core", "demo", "ops", "streams", "serving", "updater", "torch", "ray", "numpy", "pydantic"} & {
        path.name for path in packages.iterdir()
    }


def test_what_it_publishes_is_found_by_what_it_asks(
    python: Path, server: ServerFixture, kafka: Kafka, tmp_path: Path
) -> None:
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, path in enumerate(pictures):
        path.write_bytes(picture(number, size=64))
    command = [python, "-c", SCRIPT, kafka.bootstrap, kafka.topic, server.url, *pictures]
    alone = {**os.environ, "PYTHONPATH": "", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=alone, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *found, loaded = json.loads(done.stdout)
    assert all(sent == hit for sent, hit in found)
    assert {"ratchet_client", "kafka", "PIL", "httpx"} <= set(loaded)
