"""What learns in a weight, one file per method, found by its module's name.

A new one is one file here that defines ``KIND``, a subclass of :class:`updater.adapters.kinds.base.Kind`. Plain LoRA is
not here: it is PEFT's (``updater/adapters/lora.py``), which never forms ΔW.
"""

from __future__ import annotations

import importlib
import pkgutil

from ops.errors import ConfigError
from updater.adapters.kinds.base import Kind

__all__ = ["LORA", "Kind", "find", "names"]

LORA = "lora"


def names() -> list[str]:
    """Names that a recipe's ``adapter.kind`` may have."""
    return sorted({LORA, *(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")})


def find(name: str) -> type[Kind]:
    """The class of a kind. Raises ConfigError when there is none."""
    if name not in names() or name == LORA:
        raise ConfigError(f"there is no adapter kind {name!r}.", f"Use one of {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").KIND  # type: ignore[no-any-return]
