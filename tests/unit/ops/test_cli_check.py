"""``ratchet doctor --server`` tells a server that answers well from one that only answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner, Result

from core.errors import RatchetError
from ops.cli.doctor import fault_of
from ops.cli.main import app
from tests.support.web_server import reply, web_server

GOOD = np.array([[1, 0], [1, 0], [0.6, 0.8]], np.float32)


def checked(vectors: npt.NDArray[np.float32], home: Path) -> tuple[Result, list[str]]:
    """What the command says of a server that answers so, and the first lines of what it was asked."""
    rows = [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in vectors]
    with web_server() as server:
        server.pages = {
            "/v1/embeddings": reply(json.dumps({"data": rows}).encode(), connection="close"),
            "/v1/releases": reply(b'{"live": 7, "data": []}', connection="close"),
            "/health/ready/clip": reply(b"{}", connection="close"),
        }
        flags = ["--set", f"home={home}", "--set", "serve.operator_key=k"]
        url = f"http://{server.host}:{server.port}"
        done = CliRunner().invoke(app, [*flags, "doctor", "--wait", "5", "--server", url])
        return done, [head.splitlines()[0] for head in server.asked]


def test_good_embeddings_pass_and_name_their_release(tmp_path: Path) -> None:
    done, asked = checked(GOOD, tmp_path)
    assert done.exit_code == 0, done.output
    assert "as release 7: 2 dimensions" in done.output
    assert [line.split("?")[0].split()[1] for line in asked] == ["/health/ready/clip", "/v1/embeddings", "/v1/releases"]


def test_wrong_embeddings_fail(tmp_path: Path) -> None:
    done, _ = checked(2 * GOOD, tmp_path)
    assert done.exit_code == 1
    assert isinstance(done.exception, RatchetError)
    assert "length 1" in done.exception.message


@pytest.mark.parametrize(
    ("vectors", "fault"),
    [
        (GOOD, ""),
        (GOOD[:2], "came back"),
        (np.where(GOOD == 1, np.nan, GOOD), "finite"),
        (np.float32(0.5) * GOOD, "length 1"),
        (GOOD[[0, 2, 1]], "same text differ"),
        (GOOD[[0, 0, 0]], "different texts are the same"),
    ],
)
def test_each_fault_is_named(vectors: npt.NDArray[np.float32], fault: str) -> None:
    assert (fault in fault_of(vectors)) if fault else fault_of(vectors) == ""
