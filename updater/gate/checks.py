"""Engineering checks of a candidate, made before its quality is judged. Each takes plain arrays, numbers or answers and
returns a `Check`; a broken candidate gives a failed check, never an exception. The bounds are wide: they catch what is
broken, quality is judged by the suites."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn

from serving.engines.lora import effective_weights
from serving.engines.vlm.generation import GenerationRequest
from serving.engines.vlm.hf_engine import score
from serving.engines.vlm.vlm_base import VlmBase
from updater.gate.suite_items import normalise, polarity
from updater.gate.verdict import Check

Vectors = NDArray[np.float32]
Encode = Callable[[NDArray[np.uint8], list[str]], tuple[Vectors, Vectors]]
"""The trainer's model: (pixels uint8 [n, S, S, 3], texts) -> L2-normalised image and text vectors."""

RANK_RATIO = 0.5
"""Minimum effective rank of the features relative to the base's. A healthy update stays near 1."""
ROOM = 0.5
"""Minimum share of the base's spread (1 - mean pairwise cosine): at 0 all vectors are the same."""
WEIGHT_DRIFT = 1.0
"""Norm of the change relative to the norm of the changed weights: at 1 the change is as large as they are."""
PARITY = 1e-3
"""Largest cosine distance between the trainer's and the engine's vector of one input; for a VLM the largest difference
of an answer's log-probability, relative if that is above 1."""
MOST_NOISE = 0.3
"""Bound on the part of a VLM's difference that half precision may explain."""
LATENCY_RATIO, GRACE_SECONDS = 2.0, 0.005
"""Candidate over base: merged weights cost nothing, so more than noise means that they are not merged. Up to the grace,
a slowdown counts as noise whatever the ratio."""
VLM_LATENCY_RATIO, VLM_GRACE_SECONDS = 4.0, 0.05
"""LoRA layers have a cost in every VLM engine; more than this means a fault."""
RANK, MEGABYTES = 512, 512.0
FEWEST = 20
SAMENESS = 0.5
"""Share of the base's room for different answers (1 - share of the most common one) that must be left."""
VARIETY = 0.25
ONE_SIDED = 0.25
"""Share of the references' "yes" (and "no") answers that must be given."""


def check_loads(resident: bool, candidate: str, facts: Mapping[str, Any]) -> Check:
    if not resident:
        reason = str(facts.get("load_error") or f"{candidate} is not resident in the engine")
        return Check("loads", False, reason[:300])
    return Check("loads", True, "the adapter is complete, fits the base and has the digest it is named by")


def check_size(rank: int | None, size_bytes: int | None) -> Check:
    megabytes = (size_bytes or 0) / 1e6
    ok = (rank or 0) <= RANK and megabytes <= MEGABYTES
    detail = f"rank {rank if rank is not None else 'not given'}, {megabytes:.1f} MB"
    return Check("size", ok, f"{detail} (at most {RANK} and {MEGABYTES:.0f} MB)", megabytes)


def check_latency(
    ask: Callable[[str | None], object],
    candidate: str,
    what: str,
    *,
    ratio: float,
    grace: float,
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> Check:
    """Compare the fastest of `rounds` turns each, base and candidate in alternation; `ask` does the same work for both.
    Robust against a busy machine: a slow result is measured up to five times as long, and a difference of up to `grace`
    seconds always passes. Processor time excludes time in which others have the processor, but includes GPU waits."""
    best: dict[str | None, float] = {}

    def fast() -> bool:
        return best[candidate] <= ratio * best[None] or best[candidate] - best[None] <= grace

    for turn in range(1 + 5 * rounds):  # the first turn warms up
        for adapter in (None, candidate):
            started = clock()
            ask(adapter)
            seconds = clock() - started
            best[adapter] = min(best.get(adapter, math.inf), seconds) if turn else math.inf
        if turn >= rounds and fast():
            break
    relative = best[candidate] / best[None]
    detail = f"{what} {1000 * best[candidate]:.1f} ms, {relative:.2f} of the base (at most {ratio})"
    return Check("latency", fast(), detail, relative, ratio)


def check_drift(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> Check:
    """||dW|| / ||W|| over all changed weights together; the largest single one is named. Takes the state dicts of base
    and candidate as the engine holds them; unchanged tensors are shared."""
    squares = {
        name: (float((after[name] - weight).double().pow(2).sum()), float(weight.double().pow(2).sum()))
        for name, weight in before.items()
        if weight.is_floating_point() and after[name].data_ptr() != weight.data_ptr()
    }
    if not squares:
        return Check("norm_drift", True, "the candidate changes no weight", 0.0, WEIGHT_DRIFT)
    drift = float(np.sqrt(sum(c for c, _ in squares.values()) / max(sum(w for _, w in squares.values()), 1e-30)))
    name, (change, weight) = max(squares.items(), key=lambda entry: entry[1][0] / max(entry[1][1], 1e-30))
    largest = float(np.sqrt(change / max(weight, 1e-30)))
    detail = (
        f"the {len(squares)} changed weights moved by {drift:.3f} of their norm "
        f"(at most {WEIGHT_DRIFT}), most {name} by {largest:.3f}"
    )
    return Check("norm_drift", bool(drift <= WEIGHT_DRIFT), detail, drift, WEIGHT_DRIFT)


# A CLIP's vectors


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
    n = len(vectors)
    total = vectors.astype(np.float64).sum(axis=0)
    return float((total @ total - np.einsum("ij,ij->", vectors, vectors, dtype=np.float64)) / (n * (n - 1)))


def check_collapse(tower: str, base: Vectors, candidate: Vectors) -> Check:
    """Vectors of different inputs keep their distance: effective rank and spread against the base's."""
    ratio = effective_rank(candidate) / effective_rank(base)
    room = (1.0 - mean_cosine(candidate)) / max(1.0 - mean_cosine(base), 1e-9)
    detail = (
        f"effective rank of the {tower} features is {ratio:.2f} of the base's (at least {RANK_RATIO}), "
        f"their spread {room:.2f} (at least {ROOM})"
    )
    return Check(f"collapse_{tower}", ratio >= RANK_RATIO and room >= ROOM, detail, ratio, RANK_RATIO)


def check_parity(
    trainer: Encode, pixels: NDArray[np.uint8], texts: Sequence[str], served: tuple[Vectors, Vectors]
) -> Check:
    try:
        trained = trainer(pixels, list(texts))
    except Exception as error:  # whatever the trainer's model does, the gate must reach a verdict
        return Check("parity", False, f"the trainer's model failed on the probe: {error!r}"[:300])
    distances = []
    for mine, theirs in zip(trained, served, strict=True):
        if mine.shape != theirs.shape:
            return Check("parity", False, f"trainer gives shape {mine.shape}, server {theirs.shape}")
        distances.append(1.0 - np.einsum("ij,ij->i", mine, theirs, dtype=np.float64))
    worst = float(np.concatenate(distances).max())
    detail = f"trainer and server differ by a cosine distance of at most {worst:.1e} (limit {PARITY:.0e})"
    return Check("parity", bool(worst <= PARITY), detail, worst, PARITY)


# A VLM's answers


def check_vlm_drift(model: nn.Module, directory: Path) -> Check:
    after = effective_weights(directory, model)
    return check_drift({name: weight.detach() for name, weight in model.named_parameters() if name in after}, after)


def check_vlm_parity(
    base: VlmBase,
    model: nn.Module,
    directory: Path,
    asks: Sequence[GenerationRequest],
    answers: Sequence[str],
    served: Sequence[Sequence[float]],
) -> Check:
    """The engine gives answers the log-probability that transformers and PEFT give them. PEFT changes `model`
    permanently. `served` are the engine's log-probabilities of one answer to each question, by base and candidate. An
    engine in half precision also differs with the base; three times that difference is then allowed."""
    processor = base.processor()
    trained = cast(Any, PeftModel.from_pretrained(model, str(directory))).eval()
    differences = []
    for switched, theirs in zip((trained.disable_adapter(), nullcontext()), served, strict=True):
        with switched, torch.inference_mode():
            own = [score(trained, processor, ask, [text])[0] for ask, text in zip(asks, answers, strict=True)]
        differences.append(np.max(np.abs(np.subtract(own, theirs)) / np.maximum(1.0, np.abs(own))))
    noise, worst = (float(value) for value in differences)
    limit = max(PARITY, min(3.0 * noise, MOST_NOISE))
    detail = (
        f"log-probabilities of {len(asks)} answers differ by at most {worst:.1e} between transformers and the engine "
        f"(limit {limit:.0e}; {noise:.1e} with the base)"
    )
    return Check("parity", bool(worst <= limit), detail, worst, limit)


def check_sameness(references: Sequence[str], base: Sequence[str], candidate: Sequence[str]) -> Check:
    """Different questions keep different answers; the arguments are aligned, for questions that are not yes/no.
    Compared with base or references, whichever require less: a base that babbles is not a measure."""
    most, common, kinds = _mixture(candidate)
    room = min(1.0 - _mixture(base)[0], 1.0 - _mixture(references)[0]) * SAMENESS
    variety = min(_mixture(base)[2], _mixture(references)[2]) * VARIETY
    ok = 1.0 - most >= room and kinds >= variety
    detail = (
        f"{kinds} different answers to {len(candidate)} questions (at least {math.ceil(variety)}); the most common, "
        f"{common[:40]!r}, is {most:.0%} of them (at most {1.0 - room:.0%})"
    )
    return Check("collapse", ok, detail, most, 1.0 - room)


def _mixture(answers: Sequence[str]) -> tuple[float, str, int]:
    counts = Counter(normalise(answer) for answer in answers)
    common, most = counts.most_common(1)[0]
    return most / len(answers), common, len(counts)


def check_polarity(references: Sequence[str], base: Sequence[str], candidate: Sequence[str]) -> Check:
    """Yes/no questions get both answers; the arguments are aligned. If the base itself rarely gives one of them, the
    bound is lower: the candidate may stay as it is."""
    parts = []
    for word in ("yes", "no"):
        expected = share_of(word, references)
        bound = min(ONE_SIDED * expected, 0.5 * share_of(word, base))
        given = share_of(word, candidate)
        parts.append((given - bound, word, given, expected, bound))
    left, word, given, expected, bound = min(parts)
    detail = (
        f"{word!r} is {given:.0%} of the answers to {len(references)} yes/no questions; it is right for {expected:.0%} "
        f"(at least {bound:.0%})"
    )
    return Check("yes_no", left >= 0.0, detail, given, bound)


def share_of(word: str, answers: Sequence[str]) -> float:
    return sum(polarity(answer) == word for answer in answers) / len(answers)
