"""Popular client libraries, unmodified, against a real server: see ``tests/clients``."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.serving.server_fixture import TEXTS, ServerFixture
from tests.support.clients import CHECKS, CLIENTS, LibraryClient, install_node, install_python, start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
QUESTION = "what is this?"
MAX_TOKENS = 6
WRONG_KEY = "rk_00000000_" + "x" * 32
Results = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def results(shared_vlm_server: ServerFixture, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of each check of each client. The packages are installed while the server starts."""
    server, work = shared_vlm_server, tmp_path_factory.mktemp("work")
    (work / "bus.png").write_bytes(server.images[1])
    with ThreadPoolExecutor() as pool:
        python, node = pool.submit(install_python), pool.submit(install_node)
        server.ensure_running()
        folder, _ = python.result(), node.result()
    contract = work / "contract.json"
    contract.write_text(json.dumps(answered_over_plain_http(server)))
    keys = {client.name: limited_key(server, client.name) for client in CLIENTS}
    runs = [start(client, folder, work, server.url, contract, keys[client.name]) for client in CLIENTS]
    return {run.client.name: run.results() for run in runs}


def limited_key(server: ServerFixture, name: str) -> str:
    return server.ledger.create_key(name, ["infer"], actor="test", requests_per_minute=1)[1]


def answered_over_plain_http(server: ServerFixture) -> dict[str, Any]:
    texts, image = list(TEXTS[:2]), "data:image/png;base64," + base64.b64encode(server.images[0]).decode()
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
    chat = {"messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, "temperature": 0}
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60, trust_env=False) as http:
        rows = http.post("/embeddings", json={"input": texts}).json()["data"]
        answer = http.post("/chat/completions", json=chat).json()
    return {
        "texts": texts, "vectors": [row["embedding"] for row in rows], "image": image, "question": QUESTION,
        "answer": answer["choices"][0]["message"]["content"], "usage": answer["usage"], "max_tokens": MAX_TOKENS,
        "wrong_key": WRONG_KEY,
    }  # fmt: skip


CASES = [(client, check) for client in CLIENTS for check in CHECKS if check not in client.lacks]


@pytest.mark.parametrize(("client", "check"), CASES, ids=[f"{client.name}-{check}" for client, check in CASES])
def test_a_library_does_what_the_contract_says(results: Results, client: LibraryClient, check: str) -> None:
    found = results[client.name]
    assert found.get(check, found.get("crashed")) == "passed", found.get(check, found)


@pytest.mark.parametrize("client", CLIENTS, ids=[client.name for client in CLIENTS])
def test_a_script_makes_the_checks_that_its_library_has_calls_for(results: Results, client: LibraryClient) -> None:
    assert set(results[client.name]) == set(CHECKS) - client.lacks
