"""uv under the rules of pyproject.toml, isolated from this machine's settings for uv and pip; the wheels of the
repository, and environments that have nothing but them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
UV = Path(sysconfig.get_path("scripts")) / "uv"
RULES = ("constraint-dependencies", "exclude-dependencies", "override-dependencies")
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "node_modules", "tests", "docs", "helm", "examples"
)
HIDE = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not re.match("(PIP|UV)_(?!CACHE_DIR|HTTP_)", name)}


def rules(project: Path) -> str:
    """The project's own rules for uv as a configuration file: given one, uv reads no other."""
    own = tomllib.loads((project / "pyproject.toml").read_text()).get("tool", {}).get("uv", {})
    return "".join(f"{name} = {json.dumps(own[name])}\n" for name in RULES if name in own)


def uv(command: Sequence[str | Path], project: Path, clone: bool = True) -> subprocess.CompletedProcess[str]:
    """Run uv under the rules of a clone, or without rules as for a wheel."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(rules(project) if clone else "")
        file.flush()
        return subprocess.run(
            [UV, *command, "--config-file", file.name, "--no-python-downloads"],
            cwd=project, env=environment(), capture_output=True, text=True,
        )  # fmt: skip


def build(folder: Path) -> list[Path]:
    """Build every distribution into ``folder``, from a copy of the source, because a tree keeps files of earlier
    builds. Raises RuntimeError if one cannot be built.
    """
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    for project in (*source.glob("pyproject.toml"), *source.glob("*/pyproject.toml")):
        done = uv(["build", "--quiet", "--out-dir", folder], project.parent)
        if done.returncode:
            raise RuntimeError(f"{project}: {done.stderr}")
    return sorted(folder.glob("*.whl"))


def install(python: str | Path, environment: Path, built: Sequence[Path], extra: str) -> str:
    """Make an environment and install the wheels, the server's with an extra. Returns uv's error, or empty."""
    wanted = {path: f"ratchet-server[{extra}] @ {path.as_uri()}" for path in built if "ratchet_server-" in path.name}
    return _made(python, environment, [wanted.get(path, path) for path in built])


def install_beside(environment: Path, built: Sequence[Path], extra: str) -> str:
    """Make an environment of the wheels alone, which finds the packages of an extra, and no others, in this one;
    compiling torch, Ray and transformers for a new environment takes a minute. Returns uv's error, or empty.
    """
    if said := _made(sys.executable, environment, ["--no-deps", *built]):
        return said
    (site,) = environment.glob("lib/python*/site-packages")
    (server,) = metadata.distributions(name="ratchet-server", path=[str(site)])
    needed = _needed(server, extra)
    hidden = [
        name for name, owners in metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & needed
    ]  # fmt: skip
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    (site / "sitecustomize.py").write_text(HIDE.format(hidden=sorted(hidden)))
    return ""


def _needed(server: metadata.Distribution, extra: str) -> set[str]:
    found, waiting = set[tuple[str, str]](), [(server, "ratchet-server", extra)]
    while waiting:
        distribution, name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                with suppress(metadata.PackageNotFoundError):  # left out by pyproject.toml
                    other = metadata.distribution(requirement.name)
                    names = ["", *requirement.extras]
                    waiting += [(other, canonicalize_name(requirement.name), each) for each in names]
    return {name for name, _ in found}


def _made(python: str | Path, environment: Path, wanted: Sequence[str | Path]) -> str:
    """Make an environment and install these. Returns uv's error, or empty."""
    commands: list[list[str | Path]] = [
        ["venv", "--quiet", "--python", python, environment],
        ["pip", "install", "--quiet", "--python", environment / "bin" / "python", *wanted],
    ]
    for command in commands:
        done = uv(command, ROOT)
        if done.returncode:
            return done.stderr.strip()
    return ""
