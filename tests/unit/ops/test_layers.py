from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ops
from core.ledger import Ledger

ROOT = Path(ops.__file__).parents[1]
SLIM = ("ops.cli.main", "streams.ingest.consumer", "streams.store.maintenance", "ops.console.app", "ops.recovery")
PARTS = (*SLIM, "serving.app", "serving.http.ingress", "serving.replicas.catalog", "serving.releases.controller")
MODELS = {"faiss", "num2words", "open_clip", "peft", "timm", "torch", "torchvision", "transformers"}
HEAVY = {"alembic", "sqlalchemy", "kafka", "pyarrow", "lance", "pandas", "numpy", "torch", "ray", "httpx", "fsspec"}


def test_every_module_has_its_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    tree = next(contract for contract in settings["contracts"] if contract["name"].startswith("the tree"))
    assert not {key for contract in settings["contracts"] for key in contract if key.startswith("ignore")}
    for package in ("core", "ops"):
        modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        listed = {name for layer in tree["layers"] for name in re.findall(rf"{package}\.(\w+)", layer)}
        assert listed == modules | folders


def test_parts_without_a_model_do_not_import_what_brings_one() -> None:
    """The slim image lacks it, and Ray; and it takes seconds."""
    program = f"""
import importlib, sys
for name in {PARTS!r}:
    importlib.import_module(name)
    absent = {MODELS!r} | ({{"ray"}} if name in {SLIM!r} else set())
    assert not absent & sys.modules.keys(), (name, absent & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "allowed"), [(["--help"], ()), (["--version"], ()), (["releases", "list"], ("sqlalchemy",))]
)
def test_commands_import_only_what_they_need_so_that_they_start_at_once(
    tmp_path: Path, words: list[str], allowed: tuple[str, ...]
) -> None:
    Ledger.open(f"sqlite:///{tmp_path}/ledger.db").close()
    command = [sys.executable, "-X", "importtime", "-m", "ops.cli.main", "--set", f"home={tmp_path}", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "typer" in imported and not (HEAVY - {*allowed}) & imported
