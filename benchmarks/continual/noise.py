"""Wrong captions among an update's pairs; suites and the reference pool stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from core.digests import share_of
from updater.data.pools import Pair


def with_noise(pairs: Sequence[Pair], swapped: float, hostile: float) -> tuple[Pair, ...]:
    """The pairs, of which a share ``swapped`` has the captions of others among them, and a share ``hostile`` all the
    same one. The choice is by hash, so that more noise is the same noise and more of it."""
    lying = {pair.id for pair in pairs if share_of(f"hostile:{pair.id}") < hostile}
    moved = sorted(
        (pair for pair in pairs if pair.id not in lying and share_of(f"swapped:{pair.id}") < swapped),
        key=lambda pair: (pair.text, pair.id),
    )
    half = len(moved) // 2  # far from its own in the alphabet, so that few get an equal caption
    others = {pair.id: other for pair, other in zip(moved, [*moved[half:], *moved[:half]], strict=True)}
    others |= {pair.id: pairs[0] for pair in pairs if pair.id in lying}
    return tuple(
        replace(pair, text=others[pair.id].text, label=others[pair.id].label) if pair.id in others else pair
        for pair in pairs
    )
