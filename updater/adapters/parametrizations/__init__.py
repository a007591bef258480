"""What learns in a weight, one file per method, found by its module's name.

A new one is one file here that defines ``PARAMETRIZATION``, a subclass of
:class:`updater.adapters.parametrizations.parametrization.Parametrization`. Plain LoRA is not here: it is PEFT's
(``updater/adapters/lora.py``), which never forms ΔW.
"""

from __future__ import annotations

from core.errors import ConfigError
from updater.adapters.parametrizations.parametrization import Parametrization
from updater.recipes import plugin_registry

__all__ = ["LORA", "Parametrization", "find", "names"]

LORA = "lora"


def names() -> list[str]:
    """Names that a recipe's ``adapter.kind`` may have."""
    return sorted([LORA, *plugin_registry.method_names(__name__)])


def find(name: str) -> type[Parametrization]:
    """The class of a parametrization. Raises ConfigError when there is none; plain LoRA has no file here."""
    if name == LORA:
        raise ConfigError(f"there is no adapter kind {name!r}.", f"Use one of {', '.join(names())}.")
    return plugin_registry.find(__name__, "PARAMETRIZATION", "adapter kind", name, names())  # type: ignore[no-any-return]
