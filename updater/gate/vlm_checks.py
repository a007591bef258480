"""Engineering checks of a vision-language candidate. See `checks` for those of every family."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from serving.engines.lora import effective_weights
from serving.engines.vlm.generation import GenerationRequest
from serving.engines.vlm.hf_worker import score
from serving.engines.vlm.vlm_base import VlmBase
from updater.gate.answers import normalise, polarity
from updater.gate.checks import check_drift
from updater.gate.verdict import Check

FEWEST = 20
"""Answers from which anything is concluded about their mixture."""
SAMENESS = 0.5
"""Share of the room for different answers (1 - share of the most common one) that must be left."""
VARIETY = 0.25
"""Share of the different answers that must be left."""
ONE_SIDED = 0.25
"""Share of the references' "yes" (and of their "no") that must be said."""
PARITY = 1e-3
"""Largest difference of an answer's log-probability, relative where that is above 1."""
MOST_NOISE = 0.3
"""Bound on what half precision may explain."""
LATENCY_RATIO = 4.0
"""Candidate over base: LoRA layers cost something in every engine, and more than this is broken."""
GRACE_SECONDS = 0.05


def check_delta(model: nn.Module, directory: Path) -> Check:
    """||dW|| / ||W|| over the weights of the base `model` that the adapter changes, as `check_drift`."""
    after = effective_weights(directory, model)
    return check_drift({name: weight.detach() for name, weight in model.named_parameters() if name in after}, after)


def check_parity(
    base: VlmBase,
    model: nn.Module,
    directory: Path,
    asks: Sequence[GenerationRequest],
    answers: Sequence[str],
    served: Sequence[Sequence[float]],
) -> Check:
    """The engine gives an answer the log-probability that transformers and PEFT give it: what was trained is served.

    `served` are the engine's log-probabilities of one answer to each ask, by the base and by the candidate. An engine
    that computes in half precision differs with the base too; three times that much is then allowed.

    PEFT changes `model` for good.
    """
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


def check_collapse(references: Sequence[str], base: Sequence[str], candidate: Sequence[str]) -> Check:
    """Different questions keep different answers; all three are aligned, for questions that are not yes/no.

    Compared with the base or the references, whichever ask for less: a base that babbles is no measure.
    """
    most, common, kinds = _mixture(candidate)
    room = min(1.0 - _mixture(base)[0], 1.0 - _mixture(references)[0]) * SAMENESS
    variety = min(_mixture(base)[2], _mixture(references)[2]) * VARIETY
    ok = 1.0 - most >= room and kinds >= variety
    detail = (
        f"{kinds} different answers to {len(candidate)} questions (at least {math.ceil(variety)}); the most common, "
        f"{common[:40]!r}, is {most:.0%} of them (at most {1.0 - room:.0%})"
    )
    return Check("collapse", ok, detail, most, 1.0 - room)


def check_polarity(references: Sequence[str], base: Sequence[str], candidate: Sequence[str]) -> Check:
    """Both yes and no are said to yes/no questions; all three are aligned.

    A base that says one of them too rarely itself lowers what is asked for: the candidate may stay as it is.
    """
    parts = []
    for word in ("yes", "no"):
        expected = _share(references, word)
        bound = min(ONE_SIDED * expected, 0.5 * _share(base, word))
        given = _share(candidate, word)
        parts.append((given - bound, word, given, expected, bound))
    left, word, given, expected, bound = min(parts)
    detail = (
        f"{word!r} is {given:.0%} of the answers to {len(references)} yes/no questions; it is right for {expected:.0%} "
        f"(at least {bound:.0%})"
    )
    return Check("yes_no", left >= 0.0, detail, given, bound)


def check_latency(
    ask: Callable[[str | None], object],
    candidate: str,
    rounds: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Check:
    """Fastest of `rounds` turns each, base and candidate in alternation; `ask` does the same work for both.

    What looks slow is measured up to five times as long before it is believed.
    """
    best: dict[str | None, float] = {}
    for turn in range(1 + 5 * rounds):  # the first turn warms up
        for adapter in (None, candidate):
            started = clock()
            ask(adapter)
            seconds = clock() - started
            best[adapter] = min(best.get(adapter, math.inf), seconds) if turn else math.inf
        if turn >= rounds and _fast(best, candidate):
            break
    ratio = best[candidate] / best[None]
    detail = (
        f"a batch of questions takes {1000 * best[candidate]:.0f} ms, {ratio:.2f} of the base (at most {LATENCY_RATIO})"
    )
    return Check("latency", _fast(best, candidate), detail, ratio, LATENCY_RATIO)


def _fast(best: dict[str | None, float], candidate: str) -> bool:
    return best[candidate] <= LATENCY_RATIO * best[None] or best[candidate] - best[None] <= GRACE_SECONDS


def _mixture(answers: Sequence[str]) -> tuple[float, str, int]:
    """Share of the most common answer, that answer, and the number of different ones."""
    counts = Counter(normalise(answer) for answer in answers)
    common, most = counts.most_common(1)[0]
    return most / len(answers), common, len(counts)


def _share(answers: Sequence[str], word: str) -> float:
    return float(np.mean([polarity(answer) == word for answer in answers]))
