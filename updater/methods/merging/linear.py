"""Linear interpolation in ΔW space: EMA merge, WiSE-FT and PAINT, depending on what each update starts from."""

from __future__ import annotations

from updater.adapters import WeightDelta, merge


def linear(
    served: WeightDelta, trained: WeightDelta, start: WeightDelta, weight: float, towards: str = "served"
) -> WeightDelta:
    """ΔW = (1 - weight) ΔW_other + weight ΔW_trained, exactly.

    ``towards``: the other end, ``served`` (EMA merge; PAINT, Ilharco et al. 2022) or ``base``, whose ΔW is 0 (WiSE-FT,
    Wortsman et al. 2022).
    """
    if towards not in ("served", "base"):
        raise TypeError(f"towards is {towards!r}, not one of served, base")
    return merge(served if towards == "served" else {}, trained, weight)


RULE = linear
