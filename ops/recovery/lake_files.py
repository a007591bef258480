"""Which files of the lake belong to a version of a data set.

A data set of Lance is a folder of files that are written once, and a manifest for each version. The files of a version
that is pinned stay; without a pin, another process may clean them up while they are copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import lance

from core.errors import StoreUnavailable
from ops.recovery.place import Place

DATASET: Final = ".lance"
LAST_VERSION: Final = (1 << 64) - 1
"""Manifests are named by the distance to it, so that a listing has the newest one first."""


def datasets(files: Iterable[str]) -> list[str]:
    """Names of the data sets that some files belong to."""
    folders = {name.partition(f"{DATASET}/")[0] for name in files if f"{DATASET}/_versions/" in name}
    return sorted(f"{folder}{DATASET}" for folder in folders)


def version_files(lake: Place, name: str, versions: dict[int, list[str]]) -> dict[str, int]:
    """Bytes of each file that some versions of a data set consist of, by its name in the lake, the manifests last.

    Args:
        versions: with the pins on each.

    Raises:
        StoreUnavailable: one is not complete any more, or the lake is away.
    """
    listed = lake.files(name)
    wanted: list[str] = []
    manifests: list[str] = []
    for version, pins in versions.items():
        try:
            dataset = lance.dataset(f"{lake.url.rstrip('/')}/{name}", version=version)
            wanted += _data_files(dataset)
            segments = [segment for index in dataset.describe_indices() for segment in index.segments]
            folders = [f"_indices/{segment.uuid}/" for segment in segments]
        except (ValueError, OSError) as error:
            raise StoreUnavailable(f"{name} cannot be read now: {error}", "Try again.") from error
        folders.append(f"_transactions/{version - 1}-")
        inside = [path.removeprefix(f"{name}/") for path in listed]
        wanted += [path for path in inside if path.startswith(tuple(folders))]
        manifests.append(_manifest(inside, version))
        manifests += [f"_refs/tags/{pin}.json" for pin in pins]
    paths = [f"{name}/{path}" for path in dict.fromkeys([*wanted, *manifests])]
    missing = [path for path in paths if path not in listed]
    if missing:
        raise StoreUnavailable(f"{missing[0]} was cleaned up meanwhile.", "Try again.")
    return {path: listed[path] for path in paths}


def _data_files(dataset: Any) -> list[str]:
    paths: list[str] = []
    for fragment in dataset.get_fragments():
        paths += [f"data/{file.path}" for file in fragment.data_files()]
        deleted = fragment.deletion_file()
        paths += [deleted] if deleted else []
    return paths


def _manifest(inside: list[str], version: int) -> str:
    names = (f"_versions/{LAST_VERSION - version:020}.manifest", f"_versions/{version}.manifest")
    return next((name for name in names if name in inside), names[0])
