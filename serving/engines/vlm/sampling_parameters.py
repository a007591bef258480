"""Which sampling parameters an engine takes, and what it makes of them: the rules of vLLM's ``SamplingParams``, so that
both engines answer a request alike, and no value reaches a tensor in which it is not a number or zero.
"""

from __future__ import annotations

import math
from typing import Final

from serving.errors import InvalidRequest

LOWEST_TEMPERATURE: Final = 1e-2
"""A lower one is raised to it: logits divided by less overflow. 0 stays: it is greedy."""
HIGHEST_TEMPERATURE: Final = 2.0
SMALLEST: Final = 2.0**-126
"""The smallest normal float32. What is smaller and not 0 is denormal, or 0, in the tensors of a sampler."""
MOST_TOKENS: Final = 2**31 - 1
SEEDS: Final = 2**63
"""Seeds are from 0 up to it."""


def checked_temperature(value: float) -> float:
    """The temperature to sample with. Raises :class:`InvalidRequest`: not a number, denormal, or not in [0, 2]."""
    _check_number("temperature", value)
    if not 0.0 <= value <= HIGHEST_TEMPERATURE:
        raise _out_of_range("temperature", value, f"from 0 to {HIGHEST_TEMPERATURE:g}")
    return max(value, LOWEST_TEMPERATURE) if value > 0 else 0.0


def checked_top_p(value: float, temperature: float) -> float:
    """The share of the likeliest tokens; 1, which is off, where the choice is greedy. Raises :class:`InvalidRequest`:
    not a number, denormal, or not in (0, 1].
    """
    _check_number("top_p", value)
    if not 0.0 < value <= 1.0:
        raise _out_of_range("top_p", value, "above 0 and at most 1")
    return value if temperature > 0 else 1.0


def check_max_tokens(value: int) -> None:
    """Raises :class:`InvalidRequest` for none, or more than an engine counts."""
    if not 1 <= value <= MOST_TOKENS:
        raise _out_of_range("max_tokens", value, "1 or more")


def check_seed(value: int | None) -> None:
    """Raises :class:`InvalidRequest` for a seed that not every engine takes."""
    if value is not None and not 0 <= value < SEEDS:
        raise _out_of_range("seed", value, "from 0 to 2^63 - 1")


def is_denormal(value: float) -> bool:
    """Whether a value is too small for a float32 and not 0."""
    return 0.0 < abs(value) < SMALLEST


def _check_number(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise _out_of_range(field, value, "a finite number")
    if is_denormal(value):
        raise _out_of_range(field, value, f"0, or at least {SMALLEST:.3g}")


def _out_of_range(field: str, value: float | None, allowed: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {str(value)[:40]} is not {allowed}.", f"Send another {field}, or leave it out.")
