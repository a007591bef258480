"""Engineering checks: what a candidate must be before anybody asks how good it is.

Each takes plain arrays or numbers and returns a `Check`; a broken candidate gives a failed check, never an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engines.clip import ClipEngine
from updater.gate.verdict import Check

Vectors = NDArray[np.float32]
Encode = Callable[[NDArray[np.uint8], list[str]], tuple[Vectors, Vectors]]
"""The trainer's model: (pixels uint8 [n, S, S, 3], texts) -> L2-normalised image and text vectors."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the checks. They are wide: they catch what is broken, the suites judge what is good."""

    rank_ratio: float = 0.5
    """Effective rank of the features, relative to the base's. A healthy update stays near 1."""
    crowding: float = 0.5
    """Share of the base's room (1 - mean pairwise cosine) that may be lost: at 1 all vectors are the same."""
    weight_drift: float = 1.0
    """Norm of the change relative to the norm of the changed weights: at 1 the change is as large as they are."""
    parity: float = 1e-3
    """Largest cosine distance between the trainer's and the engine's vector of one input."""
    latency_ratio: float = 2.0
    """Candidate over base. Merged weights cost nothing, so more than noise means they are not merged."""
    rank: int = 512
    """LoRA rank."""
    megabytes: float = 512.0
    """Size of the adapter on disk."""


LIMITS = Limits()
GRACE_SECONDS = 0.005
"""Slower by no more than this is noise, whatever the ratio."""


def check_loads(resident: bool, candidate: str, facts: Mapping[str, Any]) -> Check:
    """The candidate is in the engine; if it would not load, `facts["load_error"]` says why."""
    if not resident:
        reason = str(facts.get("load_error") or f"{candidate} is not resident in the engine")
        return Check("loads", False, reason[:300])
    return Check("loads", True, "the adapter is complete, fits the base and has the digest it is named by")


def check_finite(images: Vectors, texts: Vectors) -> Check:
    """Every component is finite, and every vector has norm 1 (within 1%)."""
    bad = int((~np.isfinite(images).all(axis=1)).sum() + (~np.isfinite(texts).all(axis=1)).sum())
    total = len(images) + len(texts)
    if bad:
        return Check("finite", False, f"{bad} of {total} vectors hold NaN or infinity", float(bad), 0.0)
    norms = np.concatenate([np.linalg.norm(images, axis=1), np.linalg.norm(texts, axis=1)])
    off = float(np.abs(norms - 1.0).max())
    detail = f"{total} vectors are finite; their norms are 1 within {off:.1e}"
    return Check("finite", off <= 0.01, detail, off, 0.01)


def effective_rank(vectors: Vectors) -> float:
    """exp(entropy of the centred features' normalised squared singular values): Roy and Vetterli (2007)."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    energy = np.linalg.svd(centred, compute_uv=False) ** 2
    if energy.sum() <= 1e-12:
        return 1.0
    share = energy / energy.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(vectors: Vectors) -> float:
    """Mean cosine over all pairs of different rows."""
    n = len(vectors)
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - np.einsum("ij,ij->", vectors, vectors, dtype=np.float64)) / (n * (n - 1)))


def check_collapse(tower: str, base: Vectors, candidate: Vectors, limits: Limits = LIMITS) -> Check:
    """Vectors of different inputs keep their distance: effective rank and room against the base's."""
    ratio = effective_rank(candidate) / effective_rank(base)
    room = (1.0 - mean_cosine(candidate)) / max(1.0 - mean_cosine(base), 1e-9)
    ok = ratio >= limits.rank_ratio and room >= 1.0 - limits.crowding
    detail = (
        f"effective rank of the {tower} features is {ratio:.2f} of the base's (at least {limits.rank_ratio}), "
        f"their spread {room:.2f} (at least {1.0 - limits.crowding})"
    )
    return Check(f"collapse_{tower}", ok, detail, ratio, limits.rank_ratio)


def check_drift(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], limits: Limits = LIMITS
) -> Check:
    """||dW|| / ||W|| over all changed weights together; the largest single one is named.

    Takes the state dicts of the base and the candidate as the engine holds them; unchanged tensors are shared.
    """
    squares = {
        name: (float((after[name] - weight).double().pow(2).sum()), float(weight.double().pow(2).sum()))
        for name, weight in before.items()
        if weight.is_floating_point() and after[name].data_ptr() != weight.data_ptr()
    }
    if not squares:
        return Check("norm_drift", True, "the candidate changes no weight", 0.0, limits.weight_drift)
    drift = float(np.sqrt(sum(c for c, _ in squares.values()) / max(sum(w for _, w in squares.values()), 1e-30)))
    name, (change, weight) = max(squares.items(), key=lambda entry: entry[1][0] / max(entry[1][1], 1e-30))
    largest = float(np.sqrt(change / max(weight, 1e-30)))
    detail = (
        f"the {len(squares)} changed weights moved by {drift:.3f} of their norm "
        f"(at most {limits.weight_drift}), most {name} by {largest:.3f}"
    )
    return Check("norm_drift", bool(drift <= limits.weight_drift), detail, drift, limits.weight_drift)


def check_parity(
    trainer: Encode,
    pixels: NDArray[np.uint8],
    texts: Sequence[str],
    served: tuple[Vectors, Vectors],
    limits: Limits = LIMITS,
) -> Check:
    """The trainer's model and the serving engine give the same vectors: what was trained is what is served."""
    try:
        trained = trainer(pixels, list(texts))
    except Exception as error:  # whatever the trainer's model does, the gate must come to a verdict
        return Check("parity", False, f"the trainer's model failed on the probe: {error!r}"[:300])
    distances = []
    for mine, theirs in zip(trained, served, strict=True):
        if mine.shape != theirs.shape:
            return Check("parity", False, f"trainer gives shape {mine.shape}, server {theirs.shape}")
        distances.append(1.0 - np.einsum("ij,ij->i", mine, theirs, dtype=np.float64))
    worst = float(np.concatenate(distances).max())
    detail = f"trainer and server differ by a cosine distance of at most {worst:.1e} (limit {limits.parity:.0e})"
    return Check("parity", bool(worst <= limits.parity), detail, worst, limits.parity)


def check_latency(
    engine: ClipEngine,
    candidate: str,
    pixels: NDArray[np.uint8],
    texts: Sequence[str],
    rounds: int = 5,
    limits: Limits = LIMITS,
) -> Check:
    """Least processor time of `rounds` turns each, base and candidate in alternation.

    A busy machine must not reject a candidate: the time in which others have the processor does not count, what looks
    slow is measured up to five times as long before it is believed, and a difference of a few milliseconds is never
    held against it. (A wait for a GPU is processor time, too: CUDA spins.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other measure the machine, not the model
    try:
        best = _fastest(engine, candidate, pixels, texts, rounds, limits)
    finally:
        torch.set_num_threads(threads)
    ratio = best[candidate] / best[None]
    detail = (
        f"{len(pixels)} images and {len(texts)} texts take {1000 * best[candidate]:.1f} ms, "
        f"{ratio:.2f} of the base (at most {limits.latency_ratio})"
    )
    ok = ratio <= limits.latency_ratio or best[candidate] - best[None] <= GRACE_SECONDS
    return Check("latency", ok, detail, ratio, limits.latency_ratio)


def _fastest(
    engine: ClipEngine,
    candidate: str,
    pixels: NDArray[np.uint8],
    texts: Sequence[str],
    rounds: int,
    limits: Limits,
) -> dict[str | None, float]:
    """Processor seconds of the fastest turn of base (None) and candidate."""
    best: dict[str | None, float] = {}
    for turn in range(1 + 5 * rounds):  # the first turn warms up
        for adapter in (None, candidate):
            started = time.process_time()
            engine.encode_images(pixels, adapter)
            engine.encode_texts(list(texts), adapter)
            seconds = time.process_time() - started
            best[adapter] = min(best.get(adapter, float("inf")), seconds) if turn else float("inf")
        slower = best[candidate] - best[None]
        if turn >= rounds and (best[candidate] <= limits.latency_ratio * best[None] or slower <= GRACE_SECONDS):
            break
    return best


def check_size(rank: int | None, size_bytes: int | None, limits: Limits = LIMITS) -> Check:
    """Rank and bytes of the adapter, where the trainer tells them."""
    megabytes = (size_bytes or 0) / 1e6
    ok = (rank or 0) <= limits.rank and megabytes <= limits.megabytes
    detail = f"rank {rank if rank is not None else 'not given'}, {megabytes:.1f} MB"
    return Check("size", ok, f"{detail} (at most {limits.rank} and {limits.megabytes:.0f} MB)", megabytes)
