"""uv under the rules of pyproject.toml, isolated from this machine's settings for uv and pip."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
UV = Path(sysconfig.get_path("scripts")) / "uv"
RULES = ("constraint-dependencies", "exclude-dependencies", "override-dependencies")


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
