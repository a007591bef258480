"""Measures how a base runs fastest on this machine, for ``ratchet doctor --tune``; encoders as concurrent processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from core.child_process import end_with_parent
from core.errors import ConfigError
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.precision import Measurement, best_of, measure
from serving.engines.processor import Precision, golden_pixels, processor, usable_cores

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
ENOUGH: Final = 0.95
"""The smallest batch with this share of the best rate is used; larger ones only make requests wait for each other."""
WORTH: Final = 1.15
"""Speedup that justifies the memory of another process with a copy of the adapters."""
MAX_REPLICAS: Final = 8
MEASURE_SECONDS: float = 3.0
"""Measuring time of a layout; a batch size takes a third of it."""
START_SECONDS: Final = 600.0
"""Longest wait for the other encoder processes to load the base, on a busy machine."""
Report = Callable[[str], None]
Objection = Callable[[Precision], str]


@dataclass(frozen=True, slots=True)
class Layout:
    replicas: int
    threads: int
    images_per_second: float = 0.0


@dataclass(frozen=True)
class Tuning:
    precisions: list[Measurement]
    batches: dict[int, float]
    """Images per second by batch size, one process with all cores."""
    layouts: list[Layout]

    @property
    def precision(self) -> Precision:
        return best_of(self.precisions)

    @property
    def max_batch(self) -> int:
        best = max(self.batches.values())
        return min(size for size, rate in self.batches.items() if rate >= ENOUGH * best)

    @property
    def layout(self) -> Layout:
        """The fewest processes that are not clearly slower than more of them."""
        best = self.layouts[0]
        for layout in self.layouts[1:]:
            if layout.images_per_second > WORTH * best.images_per_second:
                best = layout
        return best

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "encoder_replicas": self.layout.replicas,
            "encoder_threads": self.layout.threads,
            "max_batch": max(self.max_batch, 4),
        }


def tune(base: ClipBase, home: Path, say: Report, objection: Objection = lambda precision: "") -> Tuning:
    """Measure everything (one to two minutes for a ViT-B-32). ``say``: receives each result as text; ``objection``:
    returns the reason why a precision must not be used, or an empty string."""
    torch.set_num_threads(usable_cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = accepted(measure(base, processor(device.type).precisions, device), objection)
    precision = best_of(precisions)
    say(f"precision: {precision}")
    engine = ClipEngine(base, device, precision=precision)
    batches: dict[int, float] = {}
    for size in BATCHES:
        batches[size] = rate(engine, size, MEASURE_SECONDS / 3)
        say(f"batch of {size}: {batches[size]:.1f} images/s")
    del engine
    tuning = Tuning(precisions, batches, [])
    layouts = []
    for layout in layouts_of(usable_cores()) if device.type == "cpu" else [Layout(1, usable_cores())]:
        layouts.append(run_layout(home, base.name, precision, layout, tuning.max_batch, MEASURE_SECONDS))
        say(f"{layout.replicas} x {layout.threads} threads: {layouts[-1].images_per_second:.1f} images/s")
    return Tuning(precisions, batches, layouts)


def accepted(measured: Sequence[Measurement], objection: Objection) -> list[Measurement]:
    """Measurements, with an error on each that would win but is objected to."""
    measured = list(measured)
    while (best := best_of(measured)) != "float32" and (error := objection(best)):
        place = next(number for number, row in enumerate(measured) if row.precision == best)
        measured[place] = replace(measured[place], error=error)
    return measured


def layouts_of(cores: int) -> list[Layout]:
    """Ways to share the cores, from one process with all of them to halves, quarters and so on."""
    layouts, replicas = [], 1
    while replicas <= min(cores, MAX_REPLICAS):
        layouts.append(Layout(replicas, cores // replicas))
        replicas *= 2
    return layouts


def rate(engine: ClipEngine, size: int, seconds: float) -> float:
    """Images per second in batches of ``size``, after an uncounted first batch."""
    pixels = golden_pixels(engine.base.preprocess.size)
    batch = np.concatenate([pixels] * -(-size // len(pixels)))[:size]
    engine.encode_images(batch)
    passes, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or passes < 2:
        engine.encode_images(batch)
        passes += 1
    return passes * size / spent


def run_layout(home: Path, name: str, precision: Precision, layout: Layout, batch: int, seconds: float) -> Layout:
    """Measure encoder processes concurrently. Raises ConfigError when one dies or does not start."""
    spawn = multiprocessing.get_context("spawn")
    arguments = (home, name, precision, layout.threads, spawn.Barrier(layout.replicas))
    with ProcessPoolExecutor(layout.replicas, spawn, _load, arguments) as pool:
        futures = [pool.submit(_measure, batch, seconds) for _ in range(layout.replicas)]
        try:
            rates = [future.result() for future in futures]
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ConfigError(
                f"{layout.replicas} encoders with {layout.threads} threads did not start or end: {reason}.",
                "Look at the memory that is free; set encoder_replicas and encoder_threads by hand.",
            ) from error
    return Layout(layout.replicas, layout.threads, sum(rates))


_encoder: tuple[ClipEngine, Barrier]
"""Set in encoder processes only."""


def _load(home: Path, name: str, precision: Precision, threads: int, ready: Barrier) -> None:
    global _encoder
    end_with_parent()
    engine = ClipEngine(load_base(home, name), threads=threads, precision=precision)
    engine.encode_images(golden_pixels(engine.base.preprocess.size))
    _encoder = engine, ready


def _measure(batch: int, seconds: float) -> float:
    engine, ready = _encoder
    ready.wait(START_SECONDS)
    return rate(engine, batch, seconds)
