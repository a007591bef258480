"""Learning rates, by default without a horizon: a stream has no last step, so that no phase may depend on one.

*infinite* (Infinite LR): linear warm-up, cosine cool-down to a constant rate, constant for as long as it takes; an
exponential anneal only before a candidate is handed over. Updates that start from an incumbent skip the peak and its
cool-down: they warm up to the constant rate. *rsqrt*: linear warm-up, then peak x sqrt(W / step). Both end in the same
anneal. *cosine*: linear warm-up, then down to ``final`` over the steps of the update, anew in each: the papers' usual
one, which has a horizon.

Each update begins with an optimizer without moments, whose first steps are as long as the rate allows whatever the
gradient is. So each warms up; but for *cosine*, for at most a quarter of its steps, so that a short one still learns.

Over all of them a meta-schedule (FoMo-in-Flux) may lower the rates from update to update.
"""

from __future__ import annotations

import math

from updater.recipes import Schedule


def learning_rate(schedule: Schedule, step: int, steps: int, first: bool, update: int = 0) -> float:
    """The rate of ``step`` (from 0).

    Args:
        steps: steps of this update, which only the anneal before the hand-over looks at.
        first: whether the update starts from the base; later ones warm up to the constant phase.
        update: how many updates came before, for the meta-schedule.
    """
    return meta_factor(schedule, update, steps) * _rate(schedule, step, steps, first)


def meta_factor(schedule: Schedule, update: int, steps: int) -> float:
    """*rsqrt*: sqrt((k + 1) W / (k S + W)) after k updates of S steps, with W warm-up steps; 1 in the first update.

    It falls to sqrt(W / S), and not to 0: an endless stream is still learned from. Nothing is raised where W > S.
    """
    warm = max(schedule.warmup_steps, 1)
    if schedule.updates == "constant" or warm >= steps:
        return 1.0
    return math.sqrt((update + 1) * warm / (update * steps + warm))


def _rate(schedule: Schedule, step: int, steps: int, first: bool) -> float:
    if schedule.kind == "cosine":
        return _cosine(schedule, step, steps)
    warm = min(schedule.warmup_steps, steps // 4)
    return _annealed(schedule, step, steps, first) * min(1.0, (step + 1) / max(warm, 1))


def _annealed(schedule: Schedule, step: int, steps: int, first: bool) -> float:
    rate = _endless(schedule, step, first)
    anneal = min(schedule.anneal_steps, steps)
    left = steps - step
    if left > anneal or anneal == 0:
        return rate
    start = _endless(schedule, steps - anneal, first)
    done = (anneal - left + 1) / anneal
    return float(start * (schedule.final / start) ** done)


def _cosine(schedule: Schedule, step: int, steps: int) -> float:
    warm = min(schedule.warmup_steps, steps)
    if step < warm:
        return schedule.peak * (step + 1) / warm
    done = (step - warm + 1) / (steps - warm)
    return schedule.final + (schedule.peak - schedule.final) * 0.5 * (1 + math.cos(math.pi * done))


def _endless(schedule: Schedule, step: int, first: bool) -> float:
    """The rate without warm-up and anneal."""
    warm = schedule.warmup_steps
    if schedule.kind == "rsqrt":
        return schedule.peak * math.sqrt(max(warm, 1) / max(step + 1, warm, 1))
    if not first:
        return schedule.constant
    cool = schedule.cooldown_steps
    if step < warm:
        return schedule.peak
    if step < warm + cool:
        done = (step - warm + 1) / cool
        return schedule.constant + (schedule.peak - schedule.constant) * 0.5 * (1 + math.cos(math.pi * done))
    return schedule.constant
