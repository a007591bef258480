"""Programs of clients against a server: the examples, the client's wheel alone in a new environment, and popular client
libraries, unmodified (see ``tests/clients``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.artifacts import Artifacts
from core.settings.streams import Kafka
from ratchet_client import data_uri
from serving.engines.calibration import Calibration, calibration_key, dump_calibration
from tests.integration.serving.server_fixture import TEXTS, ServerFixture
from tests.support.broker import Broker, broker
from tests.support.clients import (
    CHECKS,
    CLIENTS,
    NODE_PROGRAM,
    LibraryClient,
    install_node,
    install_python,
    start,
)
from tests.support.kafka import make_topics, picture, reading
from tests.support.pages import ROOT
from tests.support.wheels import UV

pytestmark = pytest.mark.timeout(600)
__all__ = ["broker"]
EXAMPLES = ROOT / "examples"
PICTURE = EXAMPLES / "suite" / "pictures" / "red-circle.png"


def run(server: ServerFixture, folder: Path, *command: str | Path) -> str:
    server.until_covered()
    named = {"RATCHET_CLIENT_URL": server.url, "NO_PROXY": "127.0.0.1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env={**os.environ, **named}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("program", "script"), [(sys.executable, "client.py"), (NODE_PROGRAM, "client.mjs")])
def test_a_client_embeds_classifies_and_searches(server: ServerFixture, program: str, script: str) -> None:
    embedded, classified, *hits = run(server, EXAMPLES, program, f"clients/{script}", PICTURE).splitlines()
    assert embedded.startswith("32 dimensions, similarity ")
    assert classified.startswith("red-circle.png: ") and f"release {server.client().live()}" in classified
    assert len(hits) == 3


def test_curl(server: ServerFixture) -> None:
    lines = run(server, EXAMPLES, "bash", "clients/client.sh", PICTURE).splitlines()
    embedded, classified, found = map(json.loads, lines)
    assert len(embedded["data"]) == 2
    assert set(classified["data"][0]["probabilities"]) == {"bus", "dragon", "red circle"}
    assert len(found["data"]) == 3


def test_the_cells_of_the_notebook_run_in_their_order(server: ServerFixture, tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "notebook" / "explore.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    output = run(server, EXAMPLES / "notebook", sys.executable, tmp_path / "cells.py")
    assert "(12, 4)" in output and "a red circle" in output


MAX_BYTES = 30_000_000
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


@pytest.fixture
def python(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "client", tmp_path / "client", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    made = tmp_path / "venv" / "bin" / "python"
    for command in (
        ["build", "--wheel", "-q", "--out-dir", tmp_path, tmp_path / "client"],
        ["venv", "-q", "--python", sys.executable, tmp_path / "venv"],
    ):
        subprocess.run([UV, *command], check=True, timeout=300)
    [wheel] = tmp_path.glob("ratchet_client-*.whl")
    subprocess.run([UV, "pip", "install", "-q", "--python", made, wheel], check=True, timeout=300)
    return made


@pytest.fixture
def kafka(server: ServerFixture, broker: Broker) -> Iterator[Kafka]:
    made = broker.settings(server.settings.home, ingest={"fresh_eval_share": 0.0})
    settings = server.settings.model_copy(update={"kafka": made.kafka, "ingest": made.ingest})
    make_topics(settings)
    with reading(settings):
        yield settings.kafka


def test_the_client_alone_is_small_and_finds_by_what_it_asks_what_it_publishes(
    python: Path, server: ServerFixture, kafka: Kafka, tmp_path: Path
) -> None:
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert size < MAX_BYTES
    assert (packages / "ratchet_client" / "py.typed").is_file()
    assert not {"core", "demo", "ops", "streams", "serving", "updater", "torch", "ray", "numpy", "pydantic"} & {
        path.name for path in packages.iterdir()
    }
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


QUESTION = "what is this?"
MAX_TOKENS = 6
WRONG_KEY = "rk_00000000_" + "x" * 32
OF_OPENAI = {
    "embeddings_as_float_and_base64", "embeddings_with_nulls", "chat_with_nulls_and_defaults", "error_401", "error_404",
    "error_429",
}  # fmt: skip
"""Checks of what LangChain and LlamaIndex leave to the package openai, whose own scripts make them."""
Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def results(shared_server: ServerFixture, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of each check of each client. The packages are installed while the server starts."""
    server, work = shared_server, tmp_path_factory.mktemp("work")
    (work / "bus.png").write_bytes(server.images[1])
    with ThreadPoolExecutor() as pool:
        python, node = pool.submit(install_python), pool.submit(install_node)
        server.ensure_running()
        folder, _ = python.result(), node.result()
    contract = work / "contract.json"
    contract.write_text(json.dumps(answered_over_plain_http(server)))

    def run(client: LibraryClient) -> dict[str, str]:
        _, key = server.ledger.create_key(client.name, ["infer"], actor="test", requests_per_minute=1)
        return start(client, folder, work, server.url, contract, key).results()

    # Two at a time: each imports for seconds, and more of them only wait for a processor.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip([client.name for client in CLIENTS], pool.map(run, CLIENTS), strict=True))


def allow_length(server: ServerFixture, headers: Mapping[str, str], length: int) -> int:
    """Store what a gate would that found the suites kept at this length."""
    key = calibration_key(headers["x-ratchet-image-space"], headers["x-ratchet-text-space"])
    Artifacts(server.settings.artifacts).write_bytes(key, dump_calibration(Calibration(lengths=(length,))))
    return length


def answered_over_plain_http(server: ServerFixture) -> dict[str, Any]:
    texts, image = list(TEXTS[:2]), data_uri(server.images[0])
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "temperature": 0}
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60, trust_env=False) as http:
        embedded = http.post("/embeddings", json={"input": texts})
        rows = embedded.json()["data"]
        short = allow_length(server, embedded.headers, len(rows[0]["embedding"]) // 2)
        server.until(lambda: http.post("/embeddings", json={"input": texts, "dimensions": short}).is_success)
        answer = http.post("/chat/completions", json=chat).json()
        ranked = http.post("/rerank", json={"query": texts[0], "documents": texts}).json()["results"]
    return {
        "texts": texts, "vectors": [row["embedding"] for row in rows], "short": short, "image": image,
        "question": QUESTION,
        "answer": answer["choices"][0]["message"]["content"], "usage": answer["usage"], "max_tokens": MAX_TOKENS,
        "wrong_key": WRONG_KEY, "ranked": [[row["index"], row["relevance_score"]] for row in ranked],
        "structured": server.settings.serve.vlm_engine == "vllm",
    }  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])
def test_a_library_makes_its_checks_and_does_what_the_contract_says(results: Results, client: LibraryClient) -> None:
    found = results[client.name]
    assert {check: said for check, said in found.items() if said != "passed"} == {}
    on_openai = OF_OPENAI if client.name in ("langchain", "llama-index") else set()
    assert found.keys() == set(CHECKS) - client.lacks - on_openai
