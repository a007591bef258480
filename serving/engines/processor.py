"""This machine's processor, the precisions that it is fast in, and inputs to compare precisions with."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Precision = Literal["float32", "bfloat16", "float16", "int8"]
"""Of matrix products. Vectors are always float32."""
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.float32,
}  # fmt: skip
"""Of weights and activations; with ``int8`` linear layers multiply integers, and all else stays float32."""
AMPERE = (8, 0)
"""Compute capability from which NVIDIA's tensor cores support bfloat16; float16 from 7.0."""
VOLTA = (7, 0)
GOLDEN_TEXTS = ("a photo of a cat", "red", "a small house beside a lake, at night", "12 flags of the world")
"""Inputs, with :func:`golden_pixels`, of a replica's check before it serves an adapter, and of comparisons."""


@dataclass(frozen=True, slots=True)
class Processor:
    """Flags that decide which precisions are worth trying."""

    name: str
    amx: bool = False
    avx512_bf16: bool = False
    vnni: bool = False
    """AVX512-VNNI: products of 8-bit integers; AMX has them, too."""
    cuda: tuple[int, int] | None = None
    """Compute capability of the first GPU."""

    @property
    def precisions(self) -> list[Precision]:
        """Those that are worth trying, the most exact first."""
        found: list[Precision] = ["float32"]
        if self.half is not None:
            found.append(self.half)
        if self.cuda is None and (self.vnni or self.amx):
            found.append("int8")
        return found

    @property
    def half(self) -> Precision | None:
        """The half precision that the processor has instructions for."""
        if self.cuda is not None:
            return "bfloat16" if self.cuda >= AMPERE else "float16" if self.cuda >= VOLTA else None
        return "bfloat16" if self.amx or self.avx512_bf16 else None

    @property
    def multiplies_bfloat16_fast(self) -> bool:
        """True with matrix units (tensor cores, AMX). AVX512-BF16 alone may be slower than float32."""
        return self.half == "bfloat16" and (self.cuda is not None or self.amx)


@cache
def processor(device: str = "cpu") -> Processor:
    """The processor of a device type, ``cpu`` or ``cuda``."""
    if device == "cuda" and torch.cuda.is_available():
        return Processor(torch.cuda.get_device_name(), cuda=torch.cuda.get_device_capability())
    return Processor(
        _cpu_name(),
        amx=_supports("_is_amx_tile_supported"),
        avx512_bf16=_supports("_is_avx512_bf16_supported"),
        vnni=_supports("_is_vnni_supported"),
    )


def usable_cores() -> int:
    """Cores that this process may use: CPU affinity, and quota of its control group."""
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
    except RuntimeError:  # build for another architecture
        return False


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def golden_pixels(size: int) -> np.ndarray:
    """``uint8 [4, size, size, 3]``: gradients and stripes from integer arithmetic, the same everywhere."""
    i, y, x, c = np.ogrid[1:5, 0:size, 0:size, 0:3]
    pattern: np.ndarray = (x * 37 * i + y * 11 * (5 - i) + c * 83 + (x * y // 3) * i) % 256
    return pattern.astype(np.uint8)
