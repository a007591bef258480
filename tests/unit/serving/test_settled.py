"""A replica that has started does not go through what it imported again and again."""

from __future__ import annotations

import gc
from pathlib import Path

import serving
from serving.ray.settled import settle

FIRST, LAST = "configure_replica_logging(", "settle()"
"""What a replica's constructor calls first and last."""


def test_the_collector_looks_at_what_comes_later_alone() -> None:
    before = len(gc.get_objects())
    settle()
    try:
        assert len(gc.get_objects()) < before / 100
        later: list[object] = []
        later.append(later)
        assert any(each is later for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_every_replica_settles_once_it_has_started() -> None:
    texts = {path.stem: path.read_text() for path in Path(serving.__file__).parent.rglob("*.py")}
    replicas = {name: text.partition(FIRST)[2] for name, text in texts.items() if f"        {FIRST}" in text}
    assert replicas.keys() == {"catalog", "controller", "encoder", "ingress", "vlm"}
    assert [name for name, rest in replicas.items() if f"        {LAST}\n" not in rest] == []
