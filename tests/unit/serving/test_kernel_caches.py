"""Batches of ever new shapes do not make a process grow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from serving.engines.layers import can_pack
from serving.replicas.encoder import SHAPES, VARIABLES, bound_kernel_caches

PROGRAM = f"""
from pathlib import Path
import torch
from serving.replicas.encoder import bound_kernel_caches
from serving.engines.layers import PackedLinear, pack

bound_kernel_caches()
torch.set_num_threads(1)
linear = PackedLinear(pack(torch.ones(64, 16)), torch.zeros(64))

def mebibytes_after(shapes):
    with torch.inference_mode():
        for rows in shapes:
            linear(torch.ones(1, rows, 16))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

before = mebibytes_after(range(1, {3 * SHAPES}))
print(mebibytes_after(range({3 * SHAPES}, {7 * SHAPES})) - before)
"""


@pytest.mark.skipif(not (can_pack(torch.float32) and sys.platform == "linux"), reason="needs oneDNN, and /proc")
def test_a_process_keeps_kernels_for_the_last_shapes_alone() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    assert int(done.stdout) < SHAPES * 0.7 / 2, "of four times as many shapes as are kept"


def test_a_bound_that_an_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = VARIABLES
    monkeypatch.delenv(ours, raising=False)
    monkeypatch.setenv(theirs, "7")
    bound_kernel_caches()
    assert (os.environ[ours], os.environ[theirs]) == (str(SHAPES), "7")
