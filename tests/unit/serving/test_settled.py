"""A replica that has started does not go through what it imported again and again."""

from __future__ import annotations

import gc
from pathlib import Path

import serving
from serving.ray.replica_process import freeze_gc

FIRST, LAST = "configure_replica_logging(", "settle()"
"""What a replica's constructor calls first and last."""


def test_the_collector_looks_at_what_comes_later_alone() -> None:
    before = len(gc.get_objects())
    freeze_gc()
    try:
        assert len(gc.get_objects()) < before / 100
        later: list[object] = []
        later.append(later)
        assert any(each is later for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_garbage_that_comes_later_is_collected_by_itself() -> None:
    """What a replica imported is no measure of how much garbage is worth a look: adapters leave some megabytes each."""
    imported = [[] for _ in range(600_000)]  # type: ignore[var-annotated]
    freeze_gc()
    collections = gc.get_stats()[2]["collections"]
    later: list[list[object]] = []
    try:
        for _ in range(100_000):
            later.append([later])
        assert gc.get_stats()[2]["collections"] > collections
    finally:
        later.clear()
        imported.clear()
        gc.unfreeze()


def test_every_replica_settles_once_it_has_started() -> None:
    texts = {path.stem: path.read_text() for path in Path(serving.__file__).parent.rglob("*.py")}
    replicas = {name: text.partition(FIRST)[2] for name, text in texts.items() if f"        {FIRST}" in text}
    assert replicas.keys() == {"catalog", "controller", "encoder", "ingress", "vlm"}
    assert [name for name, rest in replicas.items() if f"        {LAST}\n" not in rest] == []
