"""Run jobs of pytest in processes forked from this one, which has imported the libraries that take each of them 8 s of
a processor: ``python -m tests.jobs FOLDER WORDS...``. Each job is one word, pytest's arguments quoted as in a shell;
what it says goes to a file of its own in ``FOLDER``. Ends with status 1 if a job failed.
"""

from __future__ import annotations

import gc
import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIBRARIES = ("open_clip", "transformers.modeling_utils", "peft", "scipy.stats", "sqlalchemy.orm")
"""They start no thread when they are imported: a fork has only the thread that forked."""


def main(folder: str, jobs: Sequence[str]) -> int:
    for name in LIBRARIES:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, f"one of {LIBRARIES} starts a thread"
    gc.freeze()  # a collection would copy the pages that the processes share
    for job in jobs:
        if os.fork() == 0:
            return run(shlex.split(job), folder)
    statuses = [os.wait()[1] for _ in jobs]
    return int(any(statuses))


def run(arguments: Sequence[str], folder: str) -> int:
    file, _ = tempfile.mkstemp(dir=folder)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import pytest

    return pytest.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
