"""The log of a process: lines on standard error with time (UTC), level and logger."""

from __future__ import annotations

import logging
import time


def configure_logging() -> None:
    """Log warnings and worse to standard error. Call it once at the start of a process.

    A root logger that has handlers already, as in a program that uses Ratchet as a library, is left as it is.
    """
    handler = logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
