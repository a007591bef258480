from __future__ import annotations

from dataclasses import replace

from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import Stream, Suite
from tests.unit.updater.builders import pairs
from updater.data.pools import Pair

PROTOCOL = Protocol(gflops=0.15, batch_size=6, new=12, reference=8, replay=8, items=8)
UPDATES = ("car", "boat")


def labelled(tag: str, count: int) -> tuple[Pair, ...]:
    return tuple(replace(pair, label=pair.text) for pair in pairs(tag, count))


def stream() -> Stream:
    return Stream(
        updates={name: pairs(name, 12) for name in UPDATES},
        reference=pairs("house", 8),
        suites=(
            *(Suite(name, "adaptation", "retrieval", pairs(f"new {name}", 8)) for name in UPDATES[:1]),
            Suite("boat", "adaptation", "classification", labelled("new boat", 8), ("{}", "a picture of {}.")),
            Suite("house", "held-out", "retrieval", pairs("new house", 8)),
            Suite("tree", "held-out", "retrieval", pairs("tree", 8)),
        ),
    )
