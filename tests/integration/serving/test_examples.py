"""The examples of clients, against a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.serving.server_fixture import ServerFixture
from tests.support.clients import NODE_PROGRAM
from tests.support.pages import ROOT

pytestmark = pytest.mark.integration
EXAMPLES = ROOT / "examples"
PICTURE = EXAMPLES / "suite" / "pictures" / "red-circle.png"


@pytest.fixture(autouse=True)
def searchable(server: ServerFixture) -> None:
    with server.client() as client:
        server.until(lambda: client.status()["catalog"]["corpus_rows"] >= 40)
        server.until(lambda: client.status()["catalog"]["coverage"] >= 1.0)


def run(server: ServerFixture, folder: Path, *command: str | Path) -> str:
    named = {"RATCHET_URL": server.url, "NO_PROXY": "127.0.0.1", "MPLBACKEND": "agg"}
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
    assert classified.startswith("red-circle.png: ")
    assert f"release {server.client().live()}" in classified
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
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    (tmp_path / "cells.py").write_text("\n\n".join(cells))
    output = run(server, EXAMPLES / "notebook", sys.executable, tmp_path / "cells.py")
    assert "(12, 4)" in output
    assert "a red circle" in output
