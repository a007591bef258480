from __future__ import annotations

import sys
from pathlib import Path

from core.addresses import free_port
from tests.support.downloads import answers, launched


def test_the_console_ends_with_status_0_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    settings = (word for each in (f"home={tmp_path}", f"console.port={port}") for word in ("--set", each))
    command = [sys.executable, "-m", "ops.cli.main", *settings, "console"]
    ready = lambda: answers(f"http://127.0.0.1:{port}/health/live")  # noqa: E731
    process = launched(command, tmp_path / "log", ready, 60)
    process.terminate()
    assert process.wait(60) == 0
