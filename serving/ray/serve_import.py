"""Imports Ray Serve without pandas, which takes most of a second and which no request here brings. Each process of a
private session calls :func:`import_serve` first, so this imports little else."""

from __future__ import annotations

from core.imports import hidden


def import_serve() -> None:
    with hidden("pandas"):  # Serve catches the ImportError
        import ray.serve  # noqa: F401
