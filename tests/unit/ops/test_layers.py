from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import ops

ROOT = Path(ops.__file__).parents[1]
SLIM = ("ops.cli.main", "streams.ingest.consumer", "streams.store.maintenance", "ops.console.app", "ops.recovery")
PARTS = (*SLIM, "serving.app", "serving.http.ingress", "serving.replicas.catalog", "serving.releases.controller")
MODELS = {"faiss", "num2words", "open_clip", "peft", "timm", "torch", "torchvision", "transformers"}


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
