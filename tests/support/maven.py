"""What tests take from Maven Central: downloaded once, and kept in ``~/.cache/ratchet-tests``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

DOWNLOAD_SECONDS: Final = 600.0
Started = TypeVar("Started", bound=AbstractContextManager[Any])


class NotHere(Exception):
    """Something cannot be run on this machine; the message names what is missing."""


@contextmanager
def started(name: str, make: Callable[[], Started]) -> Iterator[Started]:
    """What ``make`` makes, running until the end of the block; skips the test where this machine cannot run it."""
    try:
        found = make()
    except NotHere as error:
        pytest.skip(f"{name} was left out: {error}")
    with found:
        yield found


def from_maven(
    name: str, folder: str, *words: str, pom: str = "", prepare: Callable[[Path], None] | None = None
) -> Path:
    """The folder ``name`` of the cache; Maven makes it at first.

    Args:
        folder: what the goal makes, relative to where Maven runs.
        words: the goal and its properties.
        pom: the project that it is run for, if it needs one.
        prepare: called with the folder before it is kept.

    Raises:
        NotHere: Java 17 or Maven is missing, or Maven cannot download it.
    """
    if missing := [each for each, program in (("Java", "java"), ("Maven", "mvn")) if shutil.which(program) is None]:
        raise NotHere(f"no {' and no '.join(missing)} (apt-get install default-jre-headless maven)")
    version = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    if (major := re.search(r'version "(\d+)', version)) is None or int(major[1]) < 17:
        raise NotHere(f"{name} needs Java 17, and here is {version.splitlines()[0]}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratchet-tests"
    kept = cache / name
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            if pom:
                (Path(made) / "pom.xml").write_text(pom)
            command = ["mvn", "-q", "-B", *words]
            done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            if done.returncode != 0:
                raise NotHere(f"Maven could not download {name}: {done.stdout[-500:]}")
            if prepare is not None:
                prepare(Path(made) / folder)
            (Path(made) / folder).rename(kept)
    return kept
