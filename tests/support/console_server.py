"""The console over HTTP, in a thread of the tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from core.settings import Settings
from core.waiting import wait_until
from ops.console.app import build_console

START_SECONDS = 60.0


@contextmanager
def console_server(settings: Settings) -> Iterator[str]:
    """Run the console on 127.0.0.1, whatever ``console.host`` says, until the end of the block. Yields its URL."""
    port = settings.console.port
    server = uvicorn.Server(uvicorn.Config(build_console(settings), "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert wait_until(lambda: server.started, START_SECONDS, alive=thread.is_alive)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
