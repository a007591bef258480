"""`ratchet console`: the console as a process."""

from __future__ import annotations

import uvicorn

from core.progress import say
from core.settings import Settings
from ops.console.app import build_console

STOP_SECONDS = 5


def run_console(settings: Settings) -> None:
    """Serve the console until SIGTERM."""
    console = settings.console
    say(f"console on http://{console.host}:{console.port}")
    uvicorn.run(
        build_console(settings),
        host=console.host,
        port=console.port,
        log_config=None,  # that of every other process
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        limit_concurrency=256,
    )
