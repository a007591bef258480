"""Imports Ray Serve without pandas, which takes most of a second and which no request here brings. Each process of a
private session calls :func:`import_serve` first, so this imports nothing else."""

from __future__ import annotations

import sys


def import_serve() -> None:
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    hidden = modules.setdefault("pandas", None) is None  # Serve catches the ImportError
    try:
        import ray.serve  # noqa: F401
    finally:
        if hidden:
            del modules["pandas"]
