"""A small run of ``ratchet bench index``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.index import run_index
from core.loading import load_settings
from core.settings.serving import BaseModels
from tests.support.tiny import tiny_base


@pytest.mark.long
@pytest.mark.timeout(600)
def test_clients_never_mix_spaces_while_the_worker_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base(tmp_path)
    ours = {"home": tmp_path, "base": BaseModels(clip="tiny", vlm="")}
    flags = ["--rows", "500", "--qdrant-rows", "500", "--base", "tiny"]
    run_index.main(load_settings(environ={}).model_copy(update=ours), flags)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for store in (figures["pgvector"], figures["qdrant"]):
        assert (store["mixed_queries"], store["lost_rows"]) == (0, 0)
        assert store["queries"] > 0 and store["recall"] >= 0.99
