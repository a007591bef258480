"""Diagnostics as lines of text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def diagnostics_lines(diagnostics: Mapping[str, Any]) -> Iterator[str]:
    """What is told beside a verdict, from its summary or its report; nothing of a verdict of an earlier version."""
    if not diagnostics:
        return
    for warning in diagnostics["warnings"]:
        yield f"warning: {warning}"
    for suite, bins in ((diagnostics["tail"] or {}).get("suites") or {}).items():
        yield f"{suite}, concepts seen " + "; ".join(
            f"{each['name']} ({each['n']} items): {_moved(each['score'])}" for each in bins
        )
    for suite, pairs in diagnostics["pairs"].items():
        yield f"{suite}, {pairs['n']} pairs that look alike: {_moved(pairs['score'])}, base {pairs['base']:.1%}"
    for suite, yes in diagnostics["yes"].items():
        yield (
            f'{suite}, share of "yes": {yes["before"]:.1%} -> {yes["after"]:.1%}; truth {yes["truth"]:.1%}, '
            f"base {yes['base']:.1%}"
        )
    shift = diagnostics["shift"]
    for tower, moved in (shift["towers"] if shift else {}).items():
        yield (
            f"{tower} features moved by {moved['from_incumbent']:.4f} from the incumbent, {moved['from_base']:.4f} "
            f"from the base; effective rank {moved['rank_before']:.1f} -> {moved['rank_after']:.1f}"
        )
    if shift:
        yield f"modality gap {shift['gap_before']:.3f} -> {shift['gap_after']:.3f}"


def _moved(score: Mapping[str, float]) -> str:
    change, low, high = (100 * score[name] for name in ("difference", "ci_low", "ci_high"))
    return f"{score['before']:.1%} -> {score['after']:.1%} ({change:+.1f} [{low:+.1f}, {high:+.1f}])"
