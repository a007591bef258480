"""Importing a library without the optional ones that it would import, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Inside the block, imports of these packages raise ImportError, unless they are imported already."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    missing = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(missing))
    try:
        yield
    finally:
        for name in missing:
            del modules[name]
