from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import DiskFull
from updater.step.shards import Fetched, Shards, Values, spans

GROUPS = ["new"] * 7 + ["reference"] * 5


class Work:
    """Shards of twelve rows: ``double`` is computed from what was fetched, ``ragged`` has another shape in each row."""

    def __init__(self, folder: Path, contents: list[str] | None = None) -> None:
        self.computed: list[range] = []
        self.fetched: list[range] = []
        layout = spans(GROUPS, {"new": 3, "reference": 4}, most=48)
        names = contents or [f"row {row}" for row in range(12)]
        self.shards = Shards(folder, layout, names, self.fetch, self.compute)

    def fetch(self, rows: range) -> Fetched:
        self.fetched.append(rows)
        return Fetched(list(rows))

    def compute(self, rows: range, fetched: list[int]) -> Values:
        self.computed.append(rows)
        values = torch.tensor(fetched, dtype=torch.float32)[:, None]
        double = values @ torch.full((1, 2), 2.0)  # counted: two multiply-adds for each row
        return {"double": list(double), "ragged": [torch.full((row + 1,), float(row)) for row in rows]}


def test_rows_are_divided_by_their_group() -> None:
    layout = spans(GROUPS, {"new": 3, "reference": 4}, most=48)
    assert [(each.name, each.start, each.end) for each in layout] == [
        ("new-0", 0, 3), ("new-1", 3, 6), ("new-2", 6, 7), ("reference-0", 7, 11), ("reference-1", 11, 12),
    ]  # fmt: skip
    assert [each.end for each in spans(["a"] * 5, {}, most=2)] == [2, 4, 5]
    # The rows of a step of five end a shard, so that however many steps follow, these shards are the same.
    assert [each.end for each in spans(["a"] * 12, {"a": 5}, most=3)] == [3, 5, 8, 10, 12]
    assert spans([], {}, most=2) == []


def test_a_shard_is_made_when_one_of_its_rows_is_asked_for_and_values_come_in_the_order_asked(tmp_path: Path) -> None:
    work, rows = Work(tmp_path), [8, 0, 1, 0]
    work.shards.ready([1, 8])
    assert work.computed == [range(3), range(7, 11)]
    work.shards.ready([0, 2, 7])
    assert len(work.computed) == 2
    assert work.shards.gflops == pytest.approx({0: 3 * 4e-9, 3: 4 * 4e-9})
    assert work.shards.mean_gflops([0, 1]) == pytest.approx(4e-9)
    assert [row.tolist() for row in work.shards.get("double", rows)] == [[16, 16], [0, 0], [2, 2], [0, 0]]
    assert [row.tolist() for row in work.shards.get("ragged", rows)] == [[8.0] * 9, [0.0], [1.0] * 2, [0.0]]
    assert work.shards.names(8) == {"double", "ragged"}
    with pytest.raises(KeyError):
        work.shards.get("triple", rows)


def test_a_later_process_finds_what_was_made_and_makes_other_rows_and_damaged_shards_again(tmp_path: Path) -> None:
    first, second = Work(tmp_path), Work(tmp_path)
    first.shards.ready(range(12))
    second.shards.ready(range(12))
    assert second.computed == second.fetched == []
    assert (second.shards.gflops, second.shards.sizes) == (first.shards.gflops, first.shards.sizes)
    damaged = tmp_path / "reference-0.safetensors"
    os.truncate(damaged, damaged.stat().st_size // 2)
    other = Work(tmp_path, ["another row", *(f"row {row}" for row in range(1, 12))])
    other.shards.ready(range(12))
    assert other.computed == [range(3), range(7, 11)]


def test_the_next_shard_of_a_group_is_read_in_advance_once(tmp_path: Path) -> None:
    work = Work(tmp_path)
    for row in (0, 3, 6):
        work.shards.ready([row])
    work.shards.close()
    assert work.computed == work.fetched == [range(3), range(3, 6), range(6, 7)]


def test_a_disk_without_room_is_told_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = namedtuple("usage", "total used free")
    work = Work(tmp_path)
    work.shards.ready([0])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
        with pytest.raises(DiskFull, match=r"1 MB are free.*updater\.work_gib"):
            work.shards.ready([3])
    assert {path.name for path in tmp_path.iterdir()} == {"new-0.safetensors"}
    work.shards.ready([3])  # goes on when there is room
    assert work.shards.get("double", [3])[0].tolist() == [6, 6]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("updater.step.shards.save_file", full)
    with pytest.raises(DiskFull, match="No space left"):
        Work(tmp_path).shards.ready([0])
    assert not list(tmp_path.iterdir())
