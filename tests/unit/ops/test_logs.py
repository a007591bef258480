"""A process logs warnings once, with time, level and logger."""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """
import logging
from ops.logs import configure_logging
configure_logging()
configure_logging()
logging.getLogger("ratchet.catalog").warning("the store is %s", "away")
logging.getLogger("ratchet.catalog").info("not shown")
"""


def test_a_warning_is_one_line_on_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING ratchet\.catalog: the store is away\n", done.stderr)
    assert done.stdout == ""
