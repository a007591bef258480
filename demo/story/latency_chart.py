"""The chart of the demo's page: how long each request took around the swap and the rollback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from demo.load.traffic import Sample

WIDTH, HEIGHT = 720.0, 260.0  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58.0, 8.0, 30.0, 34.0
BEFORE_SECONDS, AFTER_SECONDS = 20.0, 12.0  # shown before the first mark and after the last
MOST_DOTS = 2000
LINES = (1, 2, 5)  # of each power of ten


@dataclass(frozen=True)
class Mark:
    """A release: when it was committed (seconds since the epoch), and what to write beside it."""

    at: float
    number: int
    label: str


@dataclass(frozen=True)
class Dot:
    """One request."""

    x: float
    y: float
    release: int
    failed: bool
    title: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Rule:
    """A mark's vertical line. Labels of neighbours lie under each other."""

    x: float
    y: float
    label: str
    right: bool
    """Whether the label ends at the line, for it would leave the drawing."""


@dataclass(frozen=True)
class Chart:
    """What the template draws, and the figures that a reader gets in words."""

    dots: tuple[Dot, ...]
    rules: tuple[Rule, ...]
    seconds: tuple[Tick, ...]
    milliseconds: tuple[Tick, ...]
    requests: int
    failed: int
    median_ms: float
    slowest_ms: float
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def latency_chart(samples: Sequence[Sample], marks: Sequence[Mark]) -> Chart | None:
    """The requests around the marks; None where there is nothing to draw.

    Latency is on a logarithmic axis. Of very many requests, evenly spread ones are drawn; the figures count all.
    """
    if not marks:
        return None
    first, last = marks[0].at, marks[-1].at
    start = first - BEFORE_SECONDS
    inside = [each for each in samples if start <= each.due <= last + AFTER_SECONDS]
    if not inside:
        return None
    end = max(last, *(each.due for each in inside)) + 1.0
    times = [max(each.seconds, 1e-4) * 1000 for each in inside]
    low, high = _nice(min(times), down=True), _nice(max(times), down=False)
    shown = inside[:: max(1, math.ceil(len(inside) / MOST_DOTS))]

    def x(at: float) -> float:
        return round(LEFT + (at - start) / (end - start) * (WIDTH - LEFT - RIGHT), 1)

    def y(ms: float) -> float:
        share = math.log(max(ms, low) / low) / math.log(high / low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def dot(each: Sample) -> Dot:
        what = each.problem or f"release {each.release}"
        return Dot(x(each.due), y(each.seconds * 1000), each.release, bool(each.problem),
                   f"{each.kind}, {each.seconds * 1000:.0f} ms, {what}")  # fmt: skip

    return Chart(
        dots=tuple(dot(each) for each in shown),
        rules=tuple(_rule(number, x(mark.at), mark.label) for number, mark in enumerate(marks)),
        seconds=tuple(Tick(x(first + at), f"{at:+d} s" if at else "swap") for at in _every(start - first, end - first)),
        milliseconds=tuple(Tick(y(ms), f"{ms:g} ms") for ms in _lines(low, high)),
        requests=len(inside),
        failed=sum(bool(each.problem) for each in inside),
        median_ms=median(times),
        slowest_ms=max(times),
    )


def _rule(number: int, x: float, label: str) -> Rule:
    return Rule(x, 10.0 + 11.0 * ((number + 1) % 2), label, right=x > WIDTH / 2)


def _nice(value: float, down: bool) -> float:
    """The next of 1, 2, 5, 10, ... below or above."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = [line * power for line in (*LINES, 10)]
    return max(s for s in steps if s <= value) if down else next(s for s in steps if s > value)


def _lines(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    lines = [line * 10.0**power for power in powers for line in LINES]
    return [line for line in lines if low <= line <= high * 1.001]


def _every(start: float, end: float) -> list[int]:
    """Whole seconds, at most about eight."""
    step = next(step for step in (5, 10, 20, 30, 60, 120, 300, 600, 3600) if (end - start) / step <= 8 or step == 3600)
    return [at for at in range(-step * 20, step * 20, step) if start <= at <= end]
