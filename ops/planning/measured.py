"""Benchmark figures for ``ratchet admin plan``, and batch times fitted to closed-loop rates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import nnls

from core.errors import ConfigError

BUILT_IN = Path(__file__).with_name("measured.yaml")
MAX_BYTES = 64 << 20
Kind = Literal["image", "text"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Cell = tuple[Kind, Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Positive]
"""Kind, inputs per request, clients that each wait for their answer, inputs per second."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = ""


class Machine(_Group):
    cores: Positive
    cells: tuple[Cell, ...] = Field(min_length=3)


class Ingress(_Group):
    """CPU time of a request outside of the encoders, in milliseconds."""

    image_cpu_ms: Positive
    text_cpu_ms: Positive


class Search(_Group):
    rows: Positive
    searches_per_second: Positive
    memory_gib: Positive
    catalog_rows_per_second: Positive


class Ingest(_Group):
    records_per_second: tuple[tuple[Positive, Positive], ...] = Field(min_length=1)
    written_per_byte: Positive
    memory_mib: Positive


class Learning(_Group):
    pairs_per_update: Positive
    seconds_per_update: Positive
    memory_gib: Positive


class Measured(_Group):
    machines: dict[str, Machine] = Field(min_length=1)
    ingress: Ingress
    search: Search
    ingest: Ingest
    learning: Learning


def built_in() -> Measured:
    """Figures of this repository's benchmarks."""
    return Measured.model_validate(yaml.safe_load(BUILT_IN.read_text()))


def machine_of(path: Path) -> Machine:
    """A machine from the output of ``ratchet bench encode``: its last line, the first model. Raises ConfigError when
    the file cannot be read or is not of that benchmark."""
    try:
        with path.open() as file:
            lines = file.read(MAX_BYTES).strip().splitlines()
        figures: dict[str, Any] = json.loads(lines[-1])
        cells = _cells(figures["cells"])
        cores = figures["machine"]["cores"]
        return Machine(source=f"ratchet bench encode, {path}", cores=cores, cells=cells)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, IndexError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{path} has no figures of `ratchet bench encode` in its last line: {str(error)[:200]}.",
            "Write one with `ratchet bench encode --against none | tee FILE`.",
        ) from error


def _cells(rows: Sequence[dict[str, Any]]) -> tuple[Cell, ...]:
    first = rows[0]["model"]
    return tuple(
        (row["kind"], row["items"], row["concurrency"], row["sides"]["ratchet"]["items_per_second"])
        for row in rows
        if row["model"] == first and "ratchet" in row["sides"]
    )


@dataclass(frozen=True)
class ServiceTimes:
    """Seconds per batch of one kind: ``first + inputs * each + requests * request``."""

    first: float
    each: float
    request: float

    def batch(self, inputs: float, requests: float) -> float:
        """Seconds of a batch of ``inputs`` that arrived in ``requests``."""
        return self.first + inputs * self.each + requests * self.request

    def most(self, max_batch: int, items: int = 1) -> float:
        """Inputs per second with full batches and ``items`` inputs per request."""
        return max_batch / self.batch(max_batch, max_batch / items)


def fit(cells: Iterable[Cell], kind: Kind, max_batch: int) -> ServiceTimes:
    """Fit times to rates by non-negative least squares on relative errors. Concurrent requests share a batch."""
    rows, times = [], []
    for own, items, clients, rate in cells:
        if own != kind:
            continue
        inputs = min(items * clients, max(max_batch, items))
        seconds = inputs / rate
        rows.append(np.array([1.0, inputs, inputs / items]) / seconds)
        times.append(1.0)
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} measured rates of {kind}s; 3 are needed.")
    first, each, request = nnls(np.array(rows), np.array(times))[0]
    return ServiceTimes(float(first), float(each), float(request))
