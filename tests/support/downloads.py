"""Programs that tests start, from the distribution, or from Maven Central or Go's module proxy.

The latter are built once and kept in ``~/.cache/ratchet-tests``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import pytest

from core.child_process import stop_reaped
from core.waiting import wait_until

DOWNLOAD_SECONDS: Final = 600.0
STOP_SECONDS: Final = 20.0
BUILD_SECONDS: Final = 1800.0
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ratchet-tests"
SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"
"""Where distributions put servers; sbin folders are not in a user's PATH."""
Started = TypeVar("Started", bound=AbstractContextManager[Any])


class NotHere(Exception):
    """Something cannot run on this machine; the message names what is missing."""


def installed(name: str) -> str | None:
    return shutil.which(name, path=SYSTEM_PATH)


@contextmanager
def started(name: str, make: Callable[[], Started]) -> Iterator[Started]:
    """Run the result of ``make`` until the end of the block; skips the test where this machine cannot."""
    try:
        found = make()
    except NotHere as error:
        pytest.skip(f"{name} was left out: {error}")
    with found:
        yield found


def launched(
    command: Sequence[str], log: Path, ready: Callable[[], bool], seconds: float, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a server and wait until it is ``ready``; ``stop_reaped`` ends it. ``log`` gets its output; ``options``: of
    Popen. Raises RuntimeError if it ends before, or is not ready within this many seconds.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **options)
    if not wait_until(ready, seconds, pause=0.05, alive=lambda: process.poll() is None):
        stop_reaped(process)
        raise RuntimeError(f"{command} did not start: ... {log.read_text()[-2000:]}")
    return process


@contextmanager
def running(
    command: Sequence[str], log: Path, ready: Callable[[], bool], seconds: float, **options: Any
) -> Iterator[None]:
    """Run a server, :func:`launched`, until the end of the block."""
    process = launched(command, log, ready, seconds, **options)
    try:
        yield
    finally:
        stop_reaped(process, STOP_SECONDS)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=60).is_success
    except httpx.HTTPError:
        return False


def from_maven(
    name: str, folder: str, *words: str, pom: str = "", prepare: Callable[[Path], object] = lambda _: None
) -> Path:
    """The folder ``name`` of the cache, made by Maven on first use: what the goal ``words`` puts into ``folder``, after
    ``prepare`` has seen it. ``pom``: the project that it is run for, if it needs one. Raises NotHere if Java 17 or
    Maven is missing, or Maven cannot download it.
    """
    if missing := [each for each, program in (("Java", "java"), ("Maven", "mvn")) if shutil.which(program) is None]:
        raise NotHere(f"no {' and no '.join(missing)} (apt-get install default-jre-headless maven)")
    version = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    if (major := re.search(r'version "(\d+)', version)) is None or int(major[1]) < 17:
        raise NotHere(f"{name} needs Java 17, and here is {version.splitlines()[0]}")

    def make(made: Path) -> None:
        if pom:
            (made / "pom.xml").write_text(pom)
        _run("Maven could not download", name, made, DOWNLOAD_SECONDS, "mvn", "-q", "-B", *words)
        prepare(made / folder)

    return _kept(name, folder, make)


def from_go(name: str, module: str, version: str, main: str = "", package: str = ".") -> Path:
    """The program ``name`` of the cache, built by Go on first use, which takes minutes. ``module``: imported by
    ``main``, a program in Go, at this ``version``; or the one that has the program's ``package``. Raises NotHere if Go
    is missing, or cannot build it.
    """
    if shutil.which("go") is None:
        raise NotHere("no Go (https://go.dev/dl)")

    def make(made: Path) -> None:
        if main:
            (made / "main.go").write_text(main)
        (made / "go.mod").write_text("module local.test/build\n\ngo 1.24.0\n")
        for each in (["get", f"{module}@{version}"], ["build", "-ldflags", "-s -w", "-o", name, package]):
            _run("Go could not build", name, made, BUILD_SECONDS, "go", *each)

    return _kept(name, name, make)


def _kept(name: str, path: str, make: Callable[[Path], None]) -> Path:
    """Return ``name`` from the cache, which gets ``path`` of the folder that ``make`` fills on first use."""
    kept = CACHE / name
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as made:
            make(Path(made))
            (Path(made) / path).rename(kept)
    return kept


def _run(problem: str, name: str, folder: Path, seconds: float, *command: str) -> None:
    go = {"GOTOOLCHAIN": "local", "GOFLAGS": "-buildvcs=false -mod=mod", "CGO_ENABLED": "0"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, env=os.environ | go)
    if done.returncode != 0:
        raise NotHere(f"{problem} {name}: {(done.stdout + done.stderr)[-500:]}")
