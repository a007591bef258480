"""What is freed in the middle of the heap goes back to the system."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from core.priority import return_free_memory

BLOCK, BLOCKS = 64 << 10, 2000
"""125 MiB in blocks that are too small to be mapped one by one."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_between_blocks_that_stay_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[::2]:
        libc.free(block)
    before = resident_bytes()
    return_free_memory()
    assert before - resident_bytes() > 0.8 * BLOCK * BLOCKS / 2
    for block in blocks[1::2]:
        libc.free(block)
