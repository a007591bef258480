"""The contract of the layers leaves no module of core and ops out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import ops

ROOT = Path(ops.__file__).parents[1]


@pytest.mark.parametrize("package", ["core", "ops"])
def test_every_module_has_its_layer(package: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    tree = next(contract for contract in settings["contracts"] if contract["name"].startswith("the tree"))
    assert not {key for contract in settings["contracts"] for key in contract if key.startswith("ignore")}
    listed = {name for layer in tree["layers"] for name in re.findall(rf"{package}\.(\w+)", layer)}
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert listed == modules | folders
