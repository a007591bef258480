"""What this machine multiplies fast, by its processor's flags. What it is worth is measured: see engine_choice."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from serving.engines.backends import Precision

AMPERE = (8, 0)
"""Compute capability from which NVIDIA's tensor cores take bfloat16; float16 from 7.0."""
VOLTA = (7, 0)


@dataclass(frozen=True, slots=True)
class Processor:
    """Flags that decide which precisions are worth a try."""

    name: str
    amx: bool = False
    avx512_bf16: bool = False
    cuda: tuple[int, int] | None = None
    """Compute capability of the first GPU."""

    @property
    def half(self) -> Precision | None:
        """The half precision that this processor has instructions for."""
        if self.cuda is not None:
            return "bfloat16" if self.cuda >= AMPERE else "float16" if self.cuda >= VOLTA else None
        return "bfloat16" if self.amx or self.avx512_bf16 else None

    @property
    def multiplies_bfloat16_fast(self) -> bool:
        """Whether it has units for products of matrices: tensor cores, or AMX. AVX512-BF16 alone may be slower than
        float32, which only a measurement tells."""
        return self.half == "bfloat16" and (self.cuda is not None or self.amx)


@cache
def processor(device: str = "cpu") -> Processor:
    """The processor that ``device`` (``cpu``, ``cuda``) names."""
    if device == "cuda" and torch.cuda.is_available():
        return Processor(torch.cuda.get_device_name(), cuda=torch.cuda.get_device_capability())
    return Processor(_cpu_name(), _supports("_is_amx_tile_supported"), _supports("_is_avx512_bf16_supported"))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def _supports(check: str) -> bool:
    function: Any = getattr(torch.cpu, check, None)
    try:
        return bool(function is not None and function())
    except RuntimeError:  # of a build for another architecture
        return False


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
