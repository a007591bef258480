"""Third-party packages, as `pip install` leaves them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from updater.recipes import plugin_registry

Install = Callable[[str, Mapping[str, str], str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Takes a package's name, the texts of its files, and its entry points."""
    names: list[str] = []

    def installed(name: str, files: Mapping[str, str], points: str) -> None:
        names.append(name)
        site = tmp_path / "site"
        about = f"{name}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n"
        whole = {f"{name}/__init__.py": "", f"{name}/recipes/__init__.py": "", **files}
        for path, text in {**whole, f"{about}/METADATA": metadata, f"{about}/entry_points.txt": points}.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        monkeypatch.syspath_prepend(site)
        plugin_registry._others.cache_clear()

    yield installed
    plugin_registry._others.cache_clear()
    for module in [module for module in sys.modules if module.partition(".")[0] in names]:
        del sys.modules[module]
