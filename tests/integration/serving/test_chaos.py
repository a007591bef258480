"""A whole server on PostgreSQL and S3, which both fail while requests and releases go on."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import chaos
from core.loading import load_settings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900), pytest.mark.long]
STATES = ("ledger-killed", "objects-away", "encoder-killed", "controller-killed")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, because Ray's and PostgreSQL's sockets are named after it."""
    folder = Path(tempfile.mkdtemp(prefix="rc-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_requests_are_answered_and_rollbacks_go_through_while_stores_and_processes_fail(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chaos.run(load_settings(environ={}), 24, STATES, seed=1, rate=4.0, vlm_engine="", folder=folder)
    chaos.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert {name: figures[name] for name in chaos.VIOLATIONS} == dict.fromkeys(chaos.VIOLATIONS, 0), figures
    assert {state["state"] for state in figures["states"]} == set(STATES)
    assert all(state["requests"] > 0 < state["rollbacks"] for state in figures["states"])
    assert figures["kills"] > 0 < figures["refusals"]
