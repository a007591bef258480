"""On a CPU a VLM needs no compiler, and leaves nothing that it compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from ops.testing.tiny_vlm import tiny_vlm_base
from serving.engines.vlm.golden import golden_requests
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.vlm_reference import Peft

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="on a GPU vLLM compiles"),
]
COMPILER = re.compile(r"(.*-)?(cc|c\d\d|gcc|g\+\+|c\+\+|cpp|ld|as|clang(\+\+)?)(-[\d.]+)?")


def without_compilers(folder: Path) -> str:
    """A PATH with all commands of this one but compilers."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for file in Path(place).glob("*"):
            if not COMPILER.fullmatch(file.name):
                link = folder / file.name
                link.unlink(missing_ok=True)
                link.symlink_to(file.resolve() if not file.name.startswith("python") else file)
    return str(folder)


def references(base: VlmBase) -> list[list[int]]:
    model = Peft(base)
    return [list(model.greedy(request).tokens) for request in golden_requests()]


def test_a_vlm_starts_and_answers_without_a_compiler_and_compiles_nothing(tmp_path: Path) -> None:
    base, cache = tiny_vlm_base(tmp_path), tmp_path / "inductor"
    cache.mkdir()
    environment = os.environ | {
        "PATH": without_compilers(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(tmp_path),
        "TORCHDYNAMO_DISABLE": "0",
    }  # fmt: skip
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.vlm_starts", str(tmp_path), base.name],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == references(base)
    assert not list(cache.iterdir())
    assert not list(tmp_path.glob("torchinductor*"))
