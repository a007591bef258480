"""The wheels of the repository, and environments that have nothing but them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.support.own_uv import ROOT, uv

NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "node_modules", "tests", "docs", "helm", "examples"
)


def projects(root: Path) -> list[Path]:
    """The folder of each distribution: one has a pyproject.toml."""
    return [path.parent for path in (*root.glob("pyproject.toml"), *sorted(root.glob("*/pyproject.toml")))]


def build(folder: Path) -> list[Path]:
    """Build every distribution into ``folder``, from a copy of the source: a tree keeps what earlier builds left.

    Raises:
        RuntimeError: one cannot be built.
    """
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    for project in projects(source):
        done = uv(["build", "--quiet", "--out-dir", folder], project)
        if done.returncode:
            raise RuntimeError(f"{project}: {done.stderr}")
    return sorted(folder.glob("*.whl"))


def install(python: str | Path, environment: Path, built: Sequence[Path], extra: str) -> str:
    """Make an environment and install the wheels, the server's with an extra; empty, or what uv says."""
    (server,) = [path for path in built if path.name.startswith("ratchet_server-")]
    others = [path for path in built if path != server]
    new = environment / "bin" / "python"
    wanted: list[str | Path] = [*others, f"ratchet-server[{extra}] @ {server.as_uri()}"]
    commands: list[list[str | Path]] = [
        ["venv", "--quiet", "--python", python, environment],
        ["pip", "install", "--quiet", "--python", new, *wanted],
    ]
    for command in commands:
        done = uv(command, ROOT)
        if done.returncode:
            return done.stderr.strip()
    return ""
