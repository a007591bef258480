"""Figures of all finished chains: one entry a method, plain values, points are hundredths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continual.chain import Unit
from benchmarks.continual.intervals import Draws, resampled
from benchmarks.continual.metrics import Trajectory, mtil, tic
from benchmarks.continual.nearest import NAME as NEAREST
from benchmarks.continual.orders import CHAINS
from benchmarks.continual.outcomes import Course, Hits, Reference, read_course, read_reference, unpacked
from benchmarks.continual.protocol import STANDARDS, Protocol
from benchmarks.continual.provenance import distinct_values
from benchmarks.continual.repeated import repeated
from benchmarks.continual.runner import failure
from benchmarks.continual.tuning import plain_trials
from benchmarks.continual.variants import recipe_named

Chains = tuple[Reference, Mapping[str, list[Course]]]
BASE = "zero-shot"
LEAST_STEPS = 8
"""Steps of an update on average, below which a method was not tried at this budget, and has no rank."""
FIGURES = ("a_ka", "a_zs", "outside", "retrieval", "classes", "unseen", "gm")


def standard_of(methods: Iterable[str]) -> str:
    """The standard method among these; empty without one."""
    return next((name for name in methods if name in STANDARDS), "")


def figures(
    results: Path, chains_read: Chains, methods: Sequence[str], updates: int, protocol: Protocol
) -> dict[str, Any]:
    """Everything that the tables and plots show."""
    reference, chains = chains_read
    first = {name: courses[0] for name, courses in chains.items()}
    untrained = {BASE: reference.base} | ({NEAREST: reference.nearest} if reference.classes else {})
    last = untrained | {name: course.hits[-1] for name, course in first.items()}
    draws = resampled({name: [hits] for name, hits in last.items()}, reference)
    zero = Course(Unit(BASE), (reference.base,), ()).trajectory(reference)
    by_method = {name: _method(name, course, reference, draws) for name, course in first.items()}
    standard = standard_of(chains)
    for name, courses in chains.items():
        by_method[name]["all"] = repeated(courses, reference, () if name == standard else chains.get(standard, ()))
    failed = {name: reason for name in methods if (reason := failure(results, Unit(name)))}
    return {
        "methods": dict(sorted(by_method.items(), key=lambda each: -each[1]["geometric_mean"])),
        "untrained": {name: _untrained(name, hits, reference, draws) for name, hits in untrained.items()},
        "failed": failed,
        "zero_shot": {
            "a_ka": _points(zero.a_ka[0]),
            "a_zs": _points(zero.a_zs[0]),
            "geometric_mean": _points(zero.gm[0]),
            "suites": {name: _points(hits.mean()) for name, hits in reference.base.items()},
        },
        "items": {name: len(hits) for name, hits in reference.base.items()},
        "adaptation": list(reference.adaptation),
        "held_out": list(reference.held_out),
        "outside": list(reference.outside),
        "classes": [name for name in reference.adaptation if name in reference.classes],
        "alike": dict(reference.alike),
        "updates": updates,
        "tuned": plain_trials(by_method),
        "protocol": vars(protocol),
        "origin": distinct_values(
            [row["origin"] for each in chains.values() for course in each for row in course.rows]
        ),
    }


def read_chains(results: Path, methods: Sequence[str], chains: int, updates: int) -> Chains:
    """The base's answers, and by method its first ``chains`` chains if the first one exists. Raises RatchetError when
    nothing was run yet.
    """
    reference = read_reference(results)
    found = {name: _courses(results, name, chains, updates, reference) for name in methods}
    return reference, {name: courses for name, courses in found.items() if courses and courses[0].unit == Unit(name)}


def ends(chains_read: Chains) -> dict[str, dict[str, float]]:
    """By method, points against zero-shot at the end of its first chain, and steps of an update."""
    reference, chains = chains_read
    found = {}
    for name, (course, *_) in chains.items():
        path = course.trajectory(reference)
        found[name] = {
            "a_ka": _deltas(path.a_ka)[-1], "a_zs": _deltas(path.a_zs)[-1], "gm": _deltas(path.gm)[-1],
            "steps": round(course.total("steps") / len(course.rows), 1),
        }  # fmt: skip
    return found


def _quality(name: str, path: Trajectory, hits: Hits, draws: Draws) -> dict[str, Any]:
    keys = [key for key in FIGURES if key == "gm" or draws.suites[key]]
    intervals = {key: draws.difference(key, name, BASE) for key in keys}
    largest = draws.largest(name, BASE)
    intervals["gm_without_largest"] = draws.difference("gm", name, BASE, [largest])
    standard = standard_of(draws.names)
    against = draws.difference("gm", name, standard) if standard not in ("", name) else None
    return {
        "a_ka_delta": round(intervals["a_ka"].value, 2),
        "a_zs_delta": round(intervals["a_zs"].value, 2),
        "geometric_mean": _points(path.gm[-1]),
        "geometric_mean_delta": round(intervals["gm"].value, 2),
        "gm_without_largest": round(intervals["gm_without_largest"].value, 2),
        "largest": largest,
        "intervals": {key: value.plain() for key, value in intervals.items()},
        "against_default": against.plain() if against else None,
        "suites": {suite: _points(each.mean()) for suite, each in hits.items()},
    }


def _untrained(name: str, hits: Hits, reference: Reference, draws: Draws) -> dict[str, Any]:
    path = Course(Unit(name), (hits,), ()).trajectory(reference)
    return {**_quality(name, path, hits, draws), "maf": 0.0, "steps": 0, "seconds": 0.0}


def _method(name: str, course: Course, reference: Reference, draws: Draws) -> dict[str, Any]:
    path = course.trajectory(reference)
    return {
        "description": recipe_named(name).description,
        **_quality(name, path, course.hits[-1], draws),
        "trajectory": {
            "a_ka": _deltas(path.a_ka), "a_zs": _deltas(path.a_zs), "geometric_mean": _deltas(path.gm)
        },
        **_matrices(course),
        **_named(course),
        **({"blind": _blind(course, reference)} if "blind" in course.rows[0] else {}),
        **({"cross_version": _cross(course)} if "cross" in course.rows[0] else {}),
        "maf": round(course.total("gflops_spent"), 1),
        # All passes before the first step, those of teachers among them.
        "maf_prepare": round(sum(r["cost"]["prepare_gflops"] * r["cost"]["memory_ratio"] for r in course.rows), 2),
        "steps": int(course.total("steps")),
        "affordable": bool(course.total("steps") >= LEAST_STEPS * len(course.rows)),
        "seconds": round(course.total("seconds"), 1),
        "cpu_seconds": round(sum(row["cpu_seconds"]["training"] for row in course.rows), 1),
        "asking_seconds": round(sum(row["cpu_seconds"]["asking"] for row in course.rows), 1),
        "peak_mib": round(course.most("peak_bytes") / 2**20, 1),
        "memory_ratio": round(course.most("memory_ratio"), 3),
    }  # fmt: skip


def _matrices(course: Course) -> dict[str, Any]:
    """MTIL's and TiC's means; none of a stream that is too short for them."""
    if len(course.rows) < 2:
        return {}
    matrix = course.path(course.order)[1:]
    whole, parts = mtil(matrix), tic(matrix)
    return {
        "mtil": {
            "transfer": _points(whole.transfer), "average": _points(whole.average), "last": _points(whole.last)
        },
        "tic": {
            "in_domain": _points(parts.in_domain),
            "backward": _points(parts.backward),
            "forward": _points(parts.forward),
        },
        "matrix": {"updates": course.order, "scores": [[_points(value) for value in row] for row in matrix]},
    }  # fmt: skip


def _named(course: Course) -> dict[str, Any]:
    """X-TAIL's means (Xu et al. 2024): every domain's items among the names of all, held-out domains included."""
    learned = [name for name in course.order if name in course.named[0]]
    if len(learned) < 2:
        return {}
    others = [name for name in course.named[0] if name not in learned]
    path = np.array([[hits[name].mean() for name in (*learned, *others)] for hits in course.named])
    first = [course.order.index(name) + 1 for name in learned] + [len(path)] * len(others)
    before = [path[1:when, column].mean() for column, when in enumerate(first) if when > 1]
    return {
        "xtail": {
            "zero_shot": _points(path[0].mean()),
            "transfer": _points(np.mean(before)),
            "average": _points(path[1:].mean()),
            "last": _points(path[-1].mean()),
        }
    }


def _blind(course: Course, reference: Reference) -> dict[str, float]:
    """Points of the same questions with a grey picture for each, at the end, and with their own."""
    hits = unpacked(course.rows[-1]["blind"])
    groups = {"learned": reference.adaptation, "kept": reference.held_out}
    return {
        f"{name}{how}": _points(np.mean([scores[suite].mean() for suite in suites]))
        for name, suites in groups.items()
        for how, scores in (("", course.hits[-1]), ("_blind", hits))
    }


def _cross(course: Course) -> dict[str, float]:
    """Points that a search gains or loses when new queries meet an index that is not or only partly rebuilt.

    ``..._at_...``: against the version before, mean over updates. The others: at the end, against the base.
    """
    rows = [row["cross"] for row in course.rows]
    steps = [name for name in rows[0] if "_at_" in name]
    return {
        **{name: _points(np.mean([row[name] - row["old_old"] for row in rows])) for name in steps},
        **{name: _points(rows[-1][name] - rows[0]["old_old"]) for name in ("new_base", "mapped_base")},
        "new_new": _points(rows[-1]["new_at_1"] - rows[0]["old_old"]),
    }


def _courses(results: Path, name: str, chains: int, updates: int, reference: Reference) -> list[Course]:
    units = [Unit(name, *place) for place in CHAINS[:chains]]
    return [course for unit in units if (course := read_course(results, unit, updates, reference))]


def _points(value: float) -> float:
    return round(100 * float(value), 2)


def _deltas(path: Any) -> list[float]:
    return [_points(value) for value in path - path[0]]
