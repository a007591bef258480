"""How many shapes oneDNN keeps kernels for.

It makes a kernel for each shape of inputs, and keeps the last 1,024 of them and as many descriptions, up to 0.7 MB a
pair. Batches of texts have more shapes than that: an encoder of 445 MB grew for a long time, to more than a gigabyte.
"""

from __future__ import annotations

import os

SHAPES = 64
"""Those of some 16 kinds of batches: a tower has four kinds of layers that multiply. Batches of ever new shapes took as
long with 64, 256 and 1,024; an encoder of 256 had 50 MB more, and grew for a quarter of an hour."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of ideep, through which torch calls it. Read once, when the first kernel is made."""


def bound_kernel_caches() -> None:
    """Call it before this process computes. A value in the environment stays."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(SHAPES))
