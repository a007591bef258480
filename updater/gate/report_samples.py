"""The samples that a report names: a report holds their ids, and who shows it reads them from the store.

A sample that was deleted is then in no report, and those that show it say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SAMPLES = ("sample", "sample_before", "sample_after")
"""Fields of :class:`updater.gate.verdict.Regression` that name a sample."""


def samples_of(report: Mapping[str, Any]) -> set[str]:
    """Ids of the samples that a report names."""
    named = {str(worse[name]) for worse in _worst(report) for name in SAMPLES if worse.get(name)}
    images = (pair[side] for pair in _pairs(report) for side in ("first", "second"))
    return named | {str(image["sample"]) for image in images if image["sample"]}


def with_samples(report: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], picture: str) -> dict[str, Any]:
    """A report with the texts and pictures of its samples.

    Args:
        report: a verdict's JSON.
        rows: by id the samples that the store has, with ``text``, ``question`` and ``answer``.
        picture: where a sample's thumbnail is, with ``{}`` for its id.
    """
    return {
        **report,
        "suites": [
            {**suite, "worst": [_filled(worse, rows, picture) for worse in suite.get("worst") or ()]}
            for suite in report.get("suites") or ()
        ],
        **_with_pairs(report, rows, picture),
    }


def _with_pairs(report: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], picture: str) -> dict[str, Any]:
    """The diagnostics with the texts and pictures of their pairs; nothing of a report of an earlier version."""
    diagnostics = report.get("diagnostics")
    if not diagnostics:
        return {}

    def filled(image: Mapping[str, Any]) -> dict[str, Any]:
        if not image["sample"]:
            return dict(image)
        row = rows.get(image["sample"])
        if row is None:
            return {**image, "text": "a sample that was deleted"}
        return {**image, "text": row["text"], "thumbnail": picture.format(image["sample"])}

    pairs = {
        suite: {
            **result,
            "shown": [{**p, "first": filled(p["first"]), "second": filled(p["second"])} for p in result["shown"]],
        }
        for suite, result in diagnostics["pairs"].items()
    }
    return {"diagnostics": {**diagnostics, "pairs": pairs}}


def _filled(worse: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], picture: str) -> dict[str, Any]:
    sample = worse.get("sample")
    if not sample:
        return dict(worse)
    row = rows.get(sample)
    if row is None:
        return {**worse, "text": "a sample that was deleted"}
    is_question = worse["view"] == "answer"
    return {
        **worse,
        "text": row["question"] if is_question else row["text"],
        "expected": row["answer"] if is_question else "",
        "thumbnail": picture.format(sample),
        "answer_before": rows.get(worse["sample_before"], {}).get("text", ""),
        "answer_after": rows.get(worse["sample_after"], {}).get("text", ""),
    }


def _worst(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for suite in report.get("suites") or ():
        yield from suite.get("worst") or ()


def _pairs(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for result in (report.get("diagnostics") or {}).get("pairs", {}).values():
        yield from result["shown"]
