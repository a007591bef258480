"""Makes an index in a process of its own, so that its memory is given back and all of its threads step back.

``python -m serving.catalog.index_process URL SPACE build|extend``; ends when its standard input is closed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Final, cast

from ops.errors import StoreError
from ops.priority import nice_process
from serving.catalog.queries import IndexChange

NICE: Final = 15


class IndexProcess:
    """Implements :data:`serving.catalog.index_keeper.ChangeIndex` for the tables under one URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, space: str, change: IndexChange) -> None:
        """Returns when it is done. Raises StoreError with the last lines that the process wrote."""
        command = [sys.executable, "-m", __name__, self.url, space, change]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        with process:
            assert process.stderr is not None
            output = process.stderr.read()
        if process.returncode:
            raise StoreError(f"the index of image space {space} cannot be made: {output.strip()[-300:]}")


def main(arguments: list[str]) -> None:
    """The process."""
    url, space, change = arguments
    nice_process(NICE)  # before any thread begins: they take it over
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from serving.catalog.tables import Tables

    Tables(url).change_index(space, cast("IndexChange", change))


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock would be held when this process ends by itself
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
