"""A small run of ``ratchet bench index``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import index
from core.loading import load_settings
from core.settings.serving import BaseModels
from tests.support.tiny import tiny_base


@pytest.mark.long
@pytest.mark.timeout(600)
def test_clients_never_mix_spaces_while_the_worker_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_base(tmp_path)
    ours = {"home": tmp_path, "base": BaseModels(clip="tiny", vlm="")}
    index.main(load_settings(environ={}).model_copy(update=ours), ["--rows", "500", "--base", "tiny"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["mixed_queries"], figures["lost_rows"]) == (0, 0)
    assert figures["queries"] > 0 and figures["recall"] >= 0.99
