"""The states of a run with their order and durations, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np

State = Literal[
    "ledger-stopped",
    "ledger-killed",
    "commit-lost",
    "objects-away",
    "objects-slow",
    "metrics-full",
    "home-full",
    "encoder-killed",
    "vlm-killed",
    "catalog-killed",
    "ingress-killed",
    "controller-killed",
    "second-server",
    "clock-ahead",
]
STATES: Final[tuple[State, ...]] = get_args(State)
LONGEST_STOP_SECONDS: Final = 180.0
STOP_SHARE: Final = 0.2
"""Share of all the time for the stopped ledger: three minutes of fifteen."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One state, and how long it is kept. Entering and leaving it take additional time."""

    state: State
    seconds: float


def plan(seconds: float, seed: int, states: Sequence[State] = STATES) -> list[Phase]:
    """The phases of a run, in an order of the seed; the second server, which replaces the first one, comes last.

    The stopped ledger takes a fifth of the time, or three minutes; the others share the rest.
    """
    drawn = [states[int(number)] for number in np.random.default_rng([seed, 1]).permutation(len(states))]
    order = sorted(drawn, key=lambda state: state == "second-server")
    others = sum(state != "ledger-stopped" for state in order)
    stopped = 0.0
    if len(order) > others:
        stopped = min(LONGEST_STOP_SECONDS, seconds * STOP_SHARE if others else seconds)
    share = (seconds - stopped) / max(1, others)
    return [Phase(state, round(stopped if state == "ledger-stopped" else share, 1)) for state in order]


def states_of(names: str) -> list[State]:
    """States by a comma-separated list of names; all when it is empty. Raises ValueError if there is no state
    of that name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in STATES]:
        raise ValueError(f"no state {', '.join(unknown)}; there are {', '.join(STATES)}")
    return [state for state in STATES if not wanted or state in wanted]
