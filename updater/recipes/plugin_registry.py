"""Plugins of recipes, found by a file's name: packages with one small file for each method."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ops.errors import ConfigError


def file_names(package: str) -> list[str]:
    """Names of a package's files, in order. What they share is in packages, and in the file that has the package's name
    in the singular: those are none.
    """
    shared = package.rpartition(".")[2].removesuffix("s")
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in modules if module.name != shared and not module.ispkg)


def find(package: str, attribute: str, what: str, name: str, known: Sequence[str]) -> Any:
    """What a file defines under ``attribute``. Raises ConfigError, which lists the ``known``, for another name."""
    if name not in known:
        raise ConfigError(f"there is no {what} {name!r}.", f"Use one of {', '.join(known)}.")
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


@contextmanager
def options_of(what: str, name: str) -> Iterator[None]:
    """Inside, a TypeError is a wrong option of a recipe: ConfigError says so."""
    try:
        yield
    except TypeError as error:
        raise ConfigError(f"{what} {name!r}: {error}.", "See its file for its options.") from None
