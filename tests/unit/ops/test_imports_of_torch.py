"""Parts that compute nothing with models start without PyTorch, whose import takes seconds."""

from __future__ import annotations

import subprocess
import sys

PARTS = (
    "ops.cli.main", "streams.ingest.consumer", "streams.store.maintenance", "ops.console.app", "serving.app",
    "serving.http.ingress", "serving.replicas.catalog", "serving.releases.controller",
)  # fmt: skip


def test_parts_without_a_model_do_not_import_torch() -> None:
    program = f"""
import importlib, sys
for name in {PARTS!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
