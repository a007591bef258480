"""Values computed once per example, stored in shards that are made when a step first needs one of their rows. A shard
is a safetensors file with the values of a few consecutive examples, written atomically. Its contents depend on its
examples and on the model at its start, never on the step, so a resumed update reads the same bits. The cost of a shard
is bounded beforehand (:mod:`updater.budget.bound`)."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.digests import digest_bytes
from core.errors import ConfigError, DiskFull
from core.files import replacing
from updater.budget.bound import Costs, Size
from updater.budget.flops import counted
from updater.step.passes import ALONE, ONE_FILE_SYSTEM, Team

RESERVE_BYTES = 256 << 20
"""Free disk space to leave for checkpoints, the adapter, and an embedded ledger on the same disk."""
_OF_ONE_ROW = re.compile(r"\.\d+$")
Values = Mapping[str, Sequence[Tensor]]
"""Values of some rows: by name one tensor for each row. Shapes may differ between rows."""


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``end`` of a learner's examples (or texts), and the name of their file."""

    name: str
    start: int
    end: int

    @property
    def rows(self) -> range:
        return range(self.start, self.end)


def spans(groups: Sequence[str], sizes: Mapping[str, int], most: int) -> list[Span]:
    """Divide rows into shards of one group each, at every multiple of its size and of at most ``most`` rows. A shard's
    name contains its group and its position in it, so more rows of another group do not change it. ``sizes``: by group,
    rows of one step, which are prepared together; ``most`` for other groups."""
    edges = [0, *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]), len(groups)]
    result: list[Span] = []
    counts: dict[str, int] = defaultdict(int)
    for first, last in pairwise(edges if groups else []):
        group = groups[first]
        size = sizes.get(group, most)
        for step in range(first, last, size):
            end = min(last, step + size)
            for start in range(step, end, most):
                result.append(Span(f"{group}-{counts[group]}", start, min(end, start + most)))
                counts[group] += 1
    return result


@dataclass(frozen=True)
class Fetched:
    values: Any = None
    left_out: Mapping[int, str] = field(default_factory=dict)
    """Reasons by row that cannot be prepared; its value is a stand-in."""


class Shards:
    """The shards of some rows. ``contents``: identifies each row; a file made of other rows is made again. ``fetch``:
    reads inputs of rows (such as images) in a thread, for the next shard in advance. ``compute``: values of rows, from
    what was fetched; its FLOPs are counted. ``size``: determines the cost of computing them. ``between``: called after
    each shard that was made. ``team``: processes with the same folder; each makes some of the shards. ``afford``:
    called before shards are made, with their maximum and minimum GFLOPs; returns the GFLOPs that they may take, or
    raises."""

    def __init__(
        self,
        folder: Path,
        layout: Sequence[Span],
        contents: Sequence[str],
        fetch: Callable[[range], Fetched],
        compute: Callable[[range, Any], Values],
        size: Callable[[range, Any], Size] = lambda rows, _: Size((len(rows),)),
        between: Callable[[], None] = lambda: None,
        team: Team = ALONE,
        afford: Callable[[float, float], float] = lambda most, least: math.inf,
    ) -> None:
        self.folder, self.layout, self.fetch, self.compute, self.between = folder, layout, fetch, compute, between
        self.contents, self.size, self.team, self.afford = contents, size, team, afford
        self.gflops: dict[int, float] = {}
        self.sizes: dict[int, int] = {}
        self.left_out: dict[int, str] = {}
        """Reasons by row of existing shards that cannot be prepared; it has values of a stand-in."""
        self._costs: dict[str, Costs] = defaultdict(Costs)
        self._place = [number for number, span in enumerate(layout) for _ in span.rows]
        self._ahead: dict[int, Future[Any]] = {}
        self._reader: ThreadPoolExecutor | None = None

    def ready(self, rows: Sequence[int]) -> None:
        """Make the missing shards of these rows. Raises DiskFull: there is no room for one of them; BudgetSpent: making
        one would exceed what ``afford`` allows."""
        wanted = [number for number in self.numbers(rows) if number not in self.gflops]
        if not wanted:
            return
        missing = self.team.agree([number for number in wanted if not self._find(number)])
        for first in range(0, len(missing), self.team.size):  # one for each process
            together = missing[first : first + self.team.size]
            own = [(number, self._fetched(number)) for number in together[self.team.rank : self.team.rank + 1]]
            bounds = [self._bounds(number, fetched) for number, fetched in own]
            limit = self.afford(*(self.team.total(sum(each[side] for each in bounds)) for side in (0, 1)))
            for number, fetched in own:
                self._make(number, fetched, limit)
                self.between()
            if self.team.size > 1:
                self.team.wait()
            if lost := [number for number in together if number not in self.gflops and not self._find(number)]:
                raise ConfigError(
                    f"{self.folder} lacks {self.layout[lost[0]].name}, which another process of this update has made.",
                    ONE_FILE_SYSTEM,
                )

    def numbers(self, rows: Sequence[int]) -> list[int]:
        return sorted({self._place[row] for row in rows})

    def get(self, name: str, rows: Sequence[int]) -> list[Tensor]:
        """One value of some ready rows. Raises KeyError if they have none of that name."""
        result: dict[int, Tensor] = {}
        by_shard: dict[int, set[int]] = defaultdict(set)
        for row in rows:
            by_shard[self._place[row]].add(row)
        for number, own in by_shard.items():
            with safe_open(self._path(number), framework="pt") as file:
                first, keys = self.layout[number].start, set(file.keys())
                if name in keys:
                    part = file.get_slice(name)
                    result |= {row: part[row - first : row - first + 1][0] for row in own}
                else:
                    for row in own:
                        if (key := f"{name}.{row - first}") not in keys:
                            raise KeyError(key)
                        result[row] = file.get_tensor(key)
        return [result[row] for row in rows]

    def mean_gflops(self, rows: Sequence[int]) -> float:
        """Mean GFLOPs per row over the shards of some ready rows; 0 without rows."""
        numbers = self.numbers(rows)
        count = sum(len(self.layout[number].rows) for number in numbers)
        return sum(self.gflops[number] for number in numbers) / count if count else 0.0

    def names(self, row: int) -> set[str]:
        with safe_open(self._path(self._place[row]), framework="pt") as file:
            return {_OF_ONE_ROW.sub("", key) for key in file.keys()}  # noqa: SIM118 - no iterator

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.layout[number].name}.safetensors"

    def _digest(self, number: int) -> str:
        return digest_bytes(*(self.contents[row].encode() for row in self.layout[number].rows))

    def _find(self, number: int) -> bool:
        """Load the metadata of a shard that an earlier process made; False if there is none."""
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata["content"] != self._digest(number):
                    return False
                self._made(
                    number,
                    float(metadata["gflops"]),
                    Size.from_json(json.loads(metadata["size"])),
                    {int(row): why for row, why in json.loads(metadata["left_out"]).items()},
                )
        except (SafetensorError, OSError, KeyError, ValueError):  # there is none, or it is damaged: it is made again
            return False
        self.sizes[number] = path.stat().st_size
        return True

    def _make(self, number: int, fetched: Fetched, limit: float) -> None:
        span = self.layout[number]
        size = self.size(span.rows, fetched.values)
        with counted(limit) as flops, torch.no_grad():
            values = self.compute(span.rows, fetched.values)
        left_out = {row - span.start: why for row, why in fetched.left_out.items()}
        metadata = {
            "content": self._digest(number),
            "gflops": repr(flops.gflops),
            "size": json.dumps(size.to_json()),
            "left_out": json.dumps(left_out),
        }
        self._write(number, _packed(values), metadata)
        self._made(number, flops.gflops, size, left_out)

    def _made(self, number: int, gflops: float, size: Size, left_out: Mapping[int, str]) -> None:
        self.gflops[number] = gflops
        self._costs[self._group(number)].add(size, gflops)
        self.left_out |= {self.layout[number].start + place: why for place, why in left_out.items()}

    def _bounds(self, number: int, fetched: Fetched) -> tuple[float, float]:
        """Maximum and minimum GFLOPs of a shard; estimated from another group if its own has none yet."""
        size, group = self.size(self.layout[number].rows, fetched.values), self._group(number)
        costs = self._costs[group if group in self._costs else next(iter(self._costs), group)]
        return costs.most(size), costs.least(size)

    def _group(self, number: int) -> str:
        return self.layout[number].name.rpartition("-")[0]

    def _fetched(self, number: int) -> Fetched:
        ahead = self._ahead.pop(number, None)
        fetched = self.fetch(self.layout[number].rows) if ahead is None else ahead.result()
        following = number + 1
        in_group = following < len(self.layout) and self._group(following) == self._group(number)
        if in_group and following not in self._ahead and not self._path(following).exists():
            self._reader = self._reader or ThreadPoolExecutor(1, "shards")
            self._ahead[following] = self._reader.submit(self.fetch, self.layout[following].rows)
        return fetched

    def _write(self, number: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        path = self._path(number)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < size + RESERVE_BYTES:
            raise self._full(f"{free / 1e6:,.0f} MB are free, and {(size + RESERVE_BYTES) / 1e6:,.0f} MB are needed")
        try:
            with replacing(path, durable=False) as staging:
                save_file(tensors, staging, metadata=metadata)
        except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
            raise self._full(str(error)) from error
        self.sizes[number] = path.stat().st_size

    def _full(self, why: str) -> DiskFull:
        return DiskFull(
            f"the disk of {self.folder} is full: {why}.",
            "Free space there, or lower updater.work_gib; the update then goes on where it is.",
        )


def _packed(values: Values) -> dict[str, Tensor]:
    """One tensor for all rows if they have one shape, otherwise one for each."""
    tensors: dict[str, Tensor] = {}
    for name, rows in values.items():
        if len({(row.shape, row.dtype) for row in rows}) == 1:
            tensors[name] = torch.stack(list(rows)).cpu().contiguous()
        else:
            tensors |= {f"{name}.{place}": row.cpu().contiguous().clone() for place, row in enumerate(rows)}
    return tensors
