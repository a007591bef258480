"""Computes from a load how many encoders, workers and machines are needed, and why. Requests waiting for encoders are
simulated event by event: as in the server, a free encoder takes all waiting requests up to a batch. Requests have one
input. Costs of a request outside of the encoders are part of the measured times if both share a machine. Batch times
are fitted to the closed-loop rates of benchmarks."""

from __future__ import annotations

import heapq
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
MAX_BATCH = 32
BUSY = 0.8
"""Planned share of busy time; the rest is for bursts, releases and a lost node."""
MOST_ENCODERS = 100_000
REQUESTS = 20_000
HOURS_A_MONTH = 730.0
KIB, GIB = 1024, 1024**3
INGEST_PEAK = 3.0
"""Records of the busiest hour, as a multiple of the average."""


@dataclass(frozen=True)
class Load:
    """The load to plan for. Rates are of the busiest minute; 0 means none."""

    images_per_second: float = 0.0
    texts_per_second: float = 0.0
    searches_per_second: float = 0.0
    stream_per_day: float = 0.0
    image_kb: float = 100.0
    corpus: float = 0.0
    p99_seconds: float = 1.0
    backfill_hours: float = 24.0
    """Time in which the corpus is embedded again after an update of the image tower."""
    price_hour: float = 0.0
    """Price of one machine like the measured one."""


@dataclass(frozen=True)
class Part:
    name: str
    count: float
    unit: str
    why: str


@dataclass(frozen=True)
class CapacityPlan:
    parts: list[Part] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def add(self, name: str, count: float, unit: str, why: str) -> None:
        self.parts.append(Part(name, count, unit, why))


def make_plan(load: Load, measured: Measured, machine: Machine) -> CapacityPlan:
    """Plan for a load. Raises ConfigError for an invalid figure, or when no number of encoders answers in time."""
    for name, value in vars(load).items():
        least = 0.0 if name not in ("p99_seconds", "image_kb", "backfill_hours") else 1e-3
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(
                f"{name.replace('_', ' ')} of {value:g} cannot be planned for.", f"Give {least:g} or more."
            )
    plan = CapacityPlan()
    nodes = _serving(plan, load, measured, machine)
    nodes += _streaming(plan, load, measured, machine)
    nodes += _learning(plan, load, measured)
    plan.add("ledger", 1, "PostgreSQL", "some rows for each update and release: a default one is enough")
    plan.add("machines", math.ceil(nodes), f"of {machine.cores:g} cores", "encoders, ingress, ingest and one updater")
    if load.price_hour:
        cost = math.ceil(nodes) * load.price_hour * HOURS_A_MONTH
        plan.add("cost", round(cost), "a month", f"{load.price_hour:g} an hour for each machine")
    return plan


def _serving(plan: CapacityPlan, load: Load, measured: Measured, machine: Machine) -> float:
    plan.sources.append(machine.source)
    texts = load.texts_per_second + load.searches_per_second
    rates: dict[Kind, float] = {"image": load.images_per_second, "text": texts}
    encoders, size = 0.0, f"of {machine.cores:g} cores"
    for kind, rate in rates.items():
        if rate:
            times = fit(machine.cells, kind, MAX_BATCH)
            count, outcome = encoders_for(times, rate, load.p99_seconds)
            encoders += count
            waits = (
                f"simulated p50 {outcome.p50 * 1000:.0f} ms, p99 {outcome.p99 * 1000:.0f} ms, busy {outcome.busy:.0%}"
            )
            most = f"one does {times.most(MAX_BATCH):.0f}/s at most"
            plan.add(f"encoders for {kind}s", count, size, f"{rate:g}/s: {waits}; {most}")
    nodes = encoders
    if any(rates.values()):
        plan.sources.append(measured.ingress.source)
        cpu = (rates["image"] * measured.ingress.image_cpu_ms + texts * measured.ingress.text_cpu_ms) / 1000
        cores = cpu / BUSY
        plan.add("ingress replicas", math.ceil(cores), "of one core", f"{cpu:.1f} s of processor time a second")
        nodes += cores / machine.cores
    if load.corpus or load.searches_per_second:
        nodes += _searching(plan, load, measured, machine, encoders)
    return nodes


def encoders_for(times: ServiceTimes, rate: float, p99_seconds: float) -> tuple[int, Outcome]:
    """The fewest encoders that answer 99% of independent requests in time and are busy at most :data:`BUSY`. Raises
    ConfigError when one request alone takes longer, or more than :data:`MOST_ENCODERS` are needed."""
    alone = times.batch(1, 1)
    if alone > p99_seconds:
        raise ConfigError(
            f"one request takes {alone:.3f} s on this machine, without any other.",
            "Allow a longer p99, or measure a faster machine (`ratchet bench plan --measured`).",
        )
    # Many encoders share the queue, so a proportional part of at most about 64 is simulated.
    share = max(1, math.ceil(rate / times.most(MAX_BATCH) / 64))

    def outcome(count: int) -> Outcome:
        return open_loop(times, rate / share, count, MAX_BATCH)

    def enough(count: int) -> bool:
        simulated = outcome(count)
        return simulated.p99 <= p99_seconds and simulated.busy <= BUSY

    least = max(1, math.ceil(rate / share / times.most(MAX_BATCH)))
    most = min(4096, 16 * least + 16)
    count = least + bisect_left(range(least, most + 1), True, key=enough)  # more encoders are never worse
    if count > most or count * share > MOST_ENCODERS:
        raise ConfigError(f"{rate:g} requests a second cannot be answered within {p99_seconds:g} s here.")
    return count * share, outcome(count)


def _searching(plan: CapacityPlan, load: Load, measured: Measured, machine: Machine, encoders: float) -> float:
    """Add catalog and backfill; returns the machines a backfill needs beyond the encoders for requests."""
    search = measured.search
    plan.sources.append(search.source)
    scale = max(load.corpus, 1.0) / search.rows
    memory = search.memory_gib * scale
    most = search.searches_per_second / max(1.0, scale)
    why = f"{load.corpus:,.0f} rows; one replica, {most:,.0f} searches/s"
    plan.add("catalog", round(memory, 1), "GiB of memory", why)
    if load.searches_per_second > BUSY * most:
        plan.warnings.append(
            f"searches: one catalog replica answers {most:,.0f} a second among so many rows (their time is counted as "
            f"growing with the rows), {load.searches_per_second:g} are wanted. There is no second one."
        )
    if memory > 256:
        plan.warnings.append(
            f"catalog: {memory:,.0f} GiB in one process. `catalog.cache_gib` bounds it, by coarser codes."
        )
    own = fit(machine.cells, "image", MAX_BATCH).most(MAX_BATCH, MAX_BATCH)  # of an encoder that does nothing else
    rate = min(own, search.catalog_rows_per_second)
    hours = load.corpus / rate / 3600
    needed = math.ceil(hours / load.backfill_hours)
    why = f"{load.corpus:,.0f} images at {rate:.0f}/s each in {load.backfill_hours:g} h; requests come first"
    plan.add("encoders for a backfill", needed, f"of {machine.cores:g} cores", why)
    least_hours = load.corpus / search.catalog_rows_per_second / 3600
    if least_hours > load.backfill_hours:
        plan.warnings.append(
            f"backfill: the catalog stores {search.catalog_rows_per_second:,.0f} rows a second, so {least_hours:,.0f} "
            "h at least. A recipe of the text tower alone needs none."
        )
    return max(0.0, needed - encoders)


def _streaming(plan: CapacityPlan, load: Load, measured: Measured, machine: Machine) -> float:
    if not load.stream_per_day:
        return 0.0
    ingest = measured.ingest
    plan.sources.append(ingest.source)
    sizes, rates = np.log(np.array(ingest.records_per_second)).T
    size = math.log(load.image_kb)
    one = math.exp(float(np.interp(size, sizes, rates)))
    if size > sizes[-1]:
        one *= math.exp(sizes[-1] - size)  # decoding time is proportional to bytes
    peak = INGEST_PEAK * load.stream_per_day / 86_400
    workers = math.ceil(peak / (BUSY * one))
    why = f"{peak:,.0f} records/s in the busiest hour ({INGEST_PEAK:g} x the mean), one does {one:,.0f}"
    plan.add("ingest workers", workers, f"of {machine.cores:g} cores", why)
    plan.add("partitions", 2 * workers, "", "two for each worker: room to double")
    stored = load.stream_per_day * load.image_kb * KIB / GIB
    why = f"and {ingest.written_per_byte:g} x as much written, by commits and maintenance"
    plan.add("lake", round(stored, 1), "GiB a day", why)
    return workers


def _learning(plan: CapacityPlan, load: Load, measured: Measured) -> int:
    if not load.stream_per_day:
        return 0
    learning = measured.learning
    plan.sources.append(learning.source)
    a_day = 86_400 / learning.seconds_per_update * learning.pairs_per_update
    arrived = load.stream_per_day
    seen = min(1.0, a_day / arrived)
    why = f"visits {min(a_day, arrived):,.0f} of {arrived:,.0f} pairs a day ({seen:.0%})"
    plan.add("updaters", 1, f"with {learning.memory_gib:g} GiB", why)
    if seen < 1:
        factor = arrived / a_day
        plan.warnings.append(
            f"learning: a day brings {factor:,.1f} x what one updater on this machine visits; the rest is passed over. "
            "Give it a GPU, or `updater.workers`."
        )
    return 1


@dataclass(frozen=True)
class Outcome:
    """Outcome of a simulated load; times in seconds."""

    requests_per_second: float
    p50: float
    p99: float
    busy: float


def open_loop(
    times: ServiceTimes, rate: float, encoders: int, max_batch: int, requests: int = REQUESTS, seed: int = 0
) -> Outcome:
    """Simulate independent requests (Poisson arrivals) at ``rate`` per second."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests)).tolist()
    taken = 0
    free = [0.0] * encoders
    waits: list[float] = []
    busy = 0.0
    while taken < requests:
        start = max(heapq.heappop(free), arrivals[taken])
        end = taken
        while end < min(requests, taken + max_batch) and arrivals[end] <= start:
            end += 1
        seconds = times.batch(end - taken, end - taken)
        waits += [start + seconds - came for came in arrivals[taken:end]]
        busy += seconds
        heapq.heappush(free, start + seconds)
        taken = end
    last = max(free)
    return outcome_of(waits, last, busy / (last * encoders))


def outcome_of(waits: list[float], seconds: float, busy: float) -> Outcome:
    p50, p99 = np.quantile(waits, [0.5, 0.99])
    return Outcome(len(waits) / seconds, float(p50), float(p99), busy)


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
