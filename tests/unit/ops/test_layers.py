"""The contract of the layers leaves no module of ops out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import ops

ROOT = Path(ops.__file__).parents[1]


def test_every_module_of_ops_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    tree = next(contract for contract in settings["contracts"] if contract["name"].startswith("the tree"))
    assert not {key for contract in settings["contracts"] for key in contract if key.startswith("ignore")}
    listed = {name for layer in tree["layers"] for name in re.findall(r"ops\.(\w+)", layer)}
    modules = {path.stem for path in (ROOT / "ops").glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / "ops").glob("*/__init__.py")}
    assert listed == modules | folders
