"""Importing a library without the optional ones that it would import, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


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


@contextmanager
def replaced(module: str, **attributes: object) -> Iterator[None]:
    """Inside the block, ``module`` has these attributes and nothing else, unless it is imported already. Modules that
    are imported there keep what they took from it."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    vars(sys.modules[module]).update(attributes)
    try:
        yield
    finally:
        del sys.modules[module]
