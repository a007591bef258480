"""Starts HAProxy for Ray Serve, with two things corrected. Run as a script; imports nothing of ours.

1. Ray 2.60 writes ``bind *:port`` for the statistics page and ``bind :port`` for the metrics, whatever the host in its
   settings: both answer every address of the machine. Here they become loopback.
2. HAProxy outlives a killed parent and keeps the port. Here the kernel is asked to end it with its parent
   (``PR_SET_PDEATHSIG``, which survives exec).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

PR_SET_PDEATHSIG = 1
OPEN_BIND = re.compile(r"^(\s*bind )\*?:(\d+)", re.MULTILINE)


def close_binds(text: str) -> str:
    """The configuration with binds of all addresses made loopback; binds that name an address stay."""
    return OPEN_BIND.sub(r"\g<1>127.0.0.1:\g<2>", text)


def main(binary: str, arguments: list[str]) -> None:
    """Correct the configuration file, and become HAProxy."""
    path = arguments[arguments.index("-f") + 1] if "-f" in arguments else None
    if path is not None:
        with open(path) as file:  # noqa: PTH123  started without site-packages, for every reload: as little as possible
            text = file.read()
        with open(path, "w") as file:  # noqa: PTH123
            file.write(close_binds(text))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execv(binary, [binary, *arguments])  # noqa: S606  fixed binary, arguments from Ray


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
