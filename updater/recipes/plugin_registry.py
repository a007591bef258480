"""Registry of methods and recipes from Ratchet and from installed packages, such as ``ratchet-methods``. A package
declares each method as an entry point, ``hinge = "my_methods.hinge:Hinge"``, in the group ``ratchet.`` plus the kind
(objectives, regularizers, merging, optimizers, adapters). Packages with recipes (YAML files) are in the group
``ratchet.recipes``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from core.errors import ConfigError

log = logging.getLogger("ratchet.recipes")
T = TypeVar("T")


class Methods(Generic[T]):
    """The methods of one kind by name: Ratchet's ``own``, which cannot be replaced, and those of installed packages.
    ``kind``: names the group of entry points; ``noun``: names a method in errors. ``base``: class that packages'
    methods derive from; without it any callable is accepted."""

    def __init__(self, kind: str, noun: str, own: Mapping[str, T], base: type | None = None) -> None:
        self.group, self.noun, self.own, self.base = f"ratchet.{kind}", noun, own, base

    def names(self) -> list[str]:
        return sorted({*self.own, *self._others()})

    def find(self, name: str) -> T:
        """Raises ConfigError for an unknown method, and for one that cannot be imported."""
        others = self._others()
        if name in self.own:
            return self.own[name]
        if name not in others:
            raise ConfigError(f"there is no {self.noun} {name!r}.", f"Use one of {', '.join(self.names())}.")
        found: Any = _loaded(others[name])
        if not callable(found) or (self.base and not (isinstance(found, type) and issubclass(found, self.base))):
            wanted = self.base.__name__ if self.base else "function"
            owner = _owner(others[name])
            raise ConfigError(f"{self.noun} {name!r} of {owner} is not a {wanted}.", "Update that package.")
        return found  # type: ignore[no-any-return]

    @contextmanager
    def options_of(self, name: str) -> Iterator[None]:
        """Turn a TypeError inside the context into a ConfigError about a recipe's options."""
        try:
            yield
        except TypeError as error:
            raise ConfigError(f"{self.noun} {name!r}: {error}.", "See its file for its options.") from None

    def _others(self) -> dict[str, EntryPoint]:
        return _others(self.group, frozenset(self.own))


def recipe_files(shipped: Path) -> dict[str, Path]:
    ours = {path.stem: path for path in sorted(shipped.glob("*.yaml"))}
    theirs: dict[str, Path] = {}
    for point in _others("ratchet.recipes", frozenset()).values():
        try:
            folders = getattr(_loaded(point), "__path__", ())
        except ConfigError as error:  # only its recipes are missing
            log.warning("%s", error)
            continue
        for folder in folders:
            theirs |= {path.stem: path for path in sorted(Path(folder).glob("*.yaml"))}
    for name in sorted(theirs.keys() & ours.keys()):
        log.warning("the recipe %s of %s is left out: Ratchet has one of that name", name, theirs[name])
    return theirs | ours


@cache
def _others(group: str, taken: frozenset[str]) -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in taken or point.name in found:
            log.warning("%s %s of %s is left out: the name is taken", group, point.name, _owner(point))
        else:
            found[point.name] = point
    return found


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # code of others
        raise ConfigError(
            f"{point.group} {point.name!r} of {_owner(point)} cannot be imported: {type(error).__name__}: {error}",
            "Update or remove that package.",
        ) from error


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
