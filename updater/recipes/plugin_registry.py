"""Plugins of recipes: our packages with one small file for each method, and what installed packages bring.

A package of somebody else names a module for each of its methods in an entry point, whose group is ``ratchet.`` and the
name of our package (objectives, regularizers, merging, optimizers, parametrizations); the module defines what a file of
ours defines. Packages with recipes (YAML files) are in the group ``ratchet.recipes``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import ConfigError

log = logging.getLogger("ratchet.recipes")


def method_names(package: str) -> list[str]:
    """Names of a package's methods, in order: its files, and what other packages bring for it."""
    own = _files(package)
    return sorted({*own, *_others(_group(package), frozenset(own))})


def method_module(package: str, name: str) -> ModuleType:
    """The module of a method. Raises ConfigError when that of another package cannot be imported."""
    own = f"{package}.{name}"
    if importlib.util.find_spec(own) is not None:
        return importlib.import_module(own)
    return _loaded(_others(_group(package), frozenset(_files(package)))[name])


def recipe_files(shipped: Path) -> dict[str, Path]:
    """Files of recipes by name: ours, and those of other packages."""
    ours = {path.stem: path for path in sorted(shipped.glob("*.yaml"))}
    theirs: dict[str, Path] = {}
    for point in _others("ratchet.recipes", frozenset()).values():
        try:
            folders = getattr(_loaded(point), "__path__", ())
        except ConfigError as error:  # its recipes are missing, and no others
            log.warning("%s", error)
            continue
        for folder in folders:
            theirs |= {path.stem: path for path in sorted(Path(folder).glob("*.yaml"))}
    for name in sorted(theirs.keys() & ours.keys()):
        log.warning("the recipe %s of %s is left out: Ratchet has one of that name", name, theirs[name])
    return theirs | ours


def find(package: str, attribute: str, what: str, name: str, known: Sequence[str]) -> Any:
    """What a method defines under ``attribute``. Raises ConfigError, which lists the ``known``, for another name."""
    if name not in known:
        raise ConfigError(f"there is no {what} {name!r}.", f"Use one of {', '.join(known)}.")
    module = method_module(package, name)
    if not hasattr(module, attribute):
        raise ConfigError(f"{what} {name!r}: {module.__name__} defines no {attribute}.", "See the files of ours.")
    return getattr(module, attribute)


@contextmanager
def options_of(what: str, name: str) -> Iterator[None]:
    """Inside, a TypeError is a wrong option of a recipe: ConfigError says so."""
    try:
        yield
    except TypeError as error:
        raise ConfigError(f"{what} {name!r}: {error}.", "See its file for its options.") from None


def _files(package: str) -> list[str]:
    """What files share is in packages, and in the file that has the package's name in the singular: those are none."""
    shared = _leaf(package).removesuffix("s")
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in modules if module.name != shared and not module.ispkg)


@cache
def _others(group: str, taken: frozenset[str]) -> dict[str, EntryPoint]:
    """Of installed packages, by name. Ours come first: a name that is taken cannot be replaced."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in taken or point.name in found:
            log.warning("%s %s of %s is left out: the name is taken", group, point.name, _owner(point))
        else:
            found[point.name] = point
    return found


def _loaded(point: EntryPoint) -> ModuleType:
    try:
        module = point.load()
    except Exception as error:  # code of others
        raise ConfigError(
            f"{point.group} {point.name!r} of {_owner(point)} cannot be imported: {type(error).__name__}: {error}",
            "Update or remove that package.",
        ) from error
    if not isinstance(module, ModuleType):
        raise ConfigError(f"{point.group} {point.name!r} of {_owner(point)} is no module.", "Name a module.")
    return module


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _group(package: str) -> str:
    return f"ratchet.{_leaf(package)}"


def _leaf(package: str) -> str:
    return package.rpartition(".")[2]
