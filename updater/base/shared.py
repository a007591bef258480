"""Bases in the artifacts, for processes that share no folder: pushed once, pulled by each pod before it starts.

>>> push_base(home, "b16", Artifacts(settings.artifacts))
>>> pull_base(home, "b16", settings.artifacts)
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from core.artifacts import Artifacts, directory_digest
from core.errors import BaseModelError
from core.progress import step
from serving.engines.clip_base import base_directory, list_bases


def push_base(home: Path, name: str, artifacts: Artifacts) -> None:
    """Store a registered base under ``bases/<name>``. The same content again is fine.

    Raises:
        BaseModelError: there is no such base.
        AdapterError: the name is taken by another base; adapters of one do not fit the other.
    """
    if name not in list_bases(home):
        raise BaseModelError(
            f"there is no base {name!r} in {home}.", "`ratchet base add` or `ratchet base build` first."
        )
    with step(f"storing base {name}"):
        artifacts.put_directory(base_directory(home, name), f"bases/{name}")


def pull_base(home: Path, name: str, url: str) -> Path:
    """Bring a base from the artifacts into ``home``; readers of ``home`` see all of it or nothing.

    Raises:
        BaseModelError: nobody pushed it, or ``home`` has another base of that name.
    """
    target = base_directory(home, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as temporary:
        artifacts = Artifacts(url, cache=Path(temporary))
        if not artifacts.exists(f"bases/{name}"):
            raise BaseModelError(f"there is no base {name!r} in {artifacts.root}.", f"Run `ratchet base push {name}`.")
        with step(f"fetching base {name}"):
            fetched = artifacts.fetch(f"bases/{name}")
        if target.exists():
            if directory_digest(target) != directory_digest(fetched):
                raise BaseModelError(
                    f"{target} is another base than the one in {artifacts.root}.", "Rename one of them."
                )
            return target
        if artifacts.local is not None:
            fetched = Path(shutil.copytree(fetched, Path(temporary) / "copy"))
        fetched.rename(target)
    return target
