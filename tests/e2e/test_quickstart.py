"""The quick start as it stands on its page: from nothing to a verdict on a base that is not the shipped one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from core.addresses import free_port
from core.ledger import Ledger
from core.loading import load_settings
from serving.engines.clip_base import list_bases
from tests.support.own_model import PATTERNS, own_model
from tests.support.pages import ROOT, Page
from tests.support.shapes import shapes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.long]

PAGE = Page(ROOT / "docs" / "quickstart.md")
MARK = "### "


def page_script() -> str:
    """The commands of the page, one block after the other; each says what it begins with."""
    blocks = [block.text for block in PAGE.blocks if block.language == "bash"]
    marked = [f"echo {shlex.quote(MARK + block.splitlines()[0])}\n{block}" for block in blocks]
    return "\n".join(["set -euo pipefail", *marked])


@contextmanager
def running(script: str, folder: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The script in a shell of its own, that is ended with all that it started."""
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)  # `ratchet up` stops its parts
        shell.wait(60)


def test_the_page_leads_from_nothing_to_a_verdict_and_back(tmp_path: Path) -> None:
    folder, mine = tmp_path / "empty", tmp_path / "mine"
    folder.mkdir()
    weights = own_model(mine / "tiny-vit", mine / "known", each=400 // len(PATTERNS))
    shapes(mine / "new", copies=58)
    ports = {f"RATCHET_{name}": str(free_port()) for name in (
        "SERVE__PORT", "CONSOLE__PORT", "INGEST__METRICS_PORT", "MAINTAIN__METRICS_PORT", "UPDATER__METRICS_PORT",
    )}  # fmt: skip
    environ = {
        **os.environ, **ports,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "120",
        "RATCHET_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}", "RATCHET_INGEST__SPLIT_KEY": "quickstart",
        "RATCHET_UPDATER__THREADS": "1", "RATCHET_UPDATER__NICE": "0",
        "RATCHET_BUDGET__GFLOPS_PER_UPDATE": "110",  # some 200 steps
        "MODEL": str(mine / "tiny-vit"), "WEIGHTS": str(weights), "KNOWN": str(mine / "known"),
        "NEW": str(mine / "new"), "SERVER": f"http://127.0.0.1:{ports['RATCHET_SERVE__PORT']}",
    }  # fmt: skip
    began = previous = time.monotonic()
    lines = []
    with running(page_script(), folder, environ) as shell:
        assert shell.stdout is not None
        for line in shell.stdout:
            lines.append(line)
            if line.startswith(MARK):
                now = time.monotonic()
                print(f"{now - previous:6.1f} s   {line.removeprefix(MARK)}", end="")
                previous = now
        assert shell.wait() == 0, "".join(lines[-60:])
    output = "".join(lines)
    print(f"{time.monotonic() - began:6.1f} s   in all\n{output}")

    settings = load_settings(folder / "ratchet.yaml", {"home": folder / ".ratchet"}, environ={})
    assert settings.base.clip == "tiny-vit"
    assert list_bases(settings.home) == ["tiny-vit"]
    assert set(yaml.safe_load((folder / "ratchet.yaml").read_text())) == {"base", "gate", "updater"}
    assert "known-classification" in output
    ledger = Ledger.open(settings.ledger)
    (verdict,) = ledger.verdicts(5)
    assert verdict.outcome == "passed", verdict.summary
    adapters = [row.clip for row in ledger.releases(5)]
    assert adapters == [None, verdict.adapter, None]
    assert (settings.home / "gate" / verdict.update_id / "report.html").is_file()
    assert len(json.loads((folder / "base.json").read_text())["data"][0]["embedding"]) == 32
    found = json.loads((folder / "found.json").read_text())["data"]
    assert sum("red" in hit["text"] for hit in found) >= 2  # its own model knew grey patterns alone
