"""A verdict as `report.json` and one self-contained `report.html`, without scripts or external fonts and images. A
report holds sample IDs only; their contents are read from the store when it is shown, so a deleted sample is in no
report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from core.files import replace_file
from updater.gate.plots import bars, forest, mean_row
from updater.gate.verdict import PAIR_CHANCE, TAIL_BINS, YES_BOUND, Verdict, jsonable

JSON_NAME = "report.json"
HTML_NAME = "report.html"
NO_LOOK = "none: it could not have passed, and spent no alpha"
TEMPLATES = Path(__file__).parent / "templates"
BOTH = ("before", "after")
SAMPLES = ("sample", *(f"sample_{when}" for when in BOTH))


def write_report(verdict: Verdict, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    value = verdict.to_json()
    replace_file(directory / JSON_NAME, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    replace_file(directory / HTML_NAME, render(value).encode())


def render(report: Mapping[str, Any]) -> str:
    """HTML page of a verdict's JSON, also for an old report."""
    return _fill("report.html", report)


def render_body(report: Mapping[str, Any]) -> str:
    """Body of the page, for inclusion in another one that links :func:`styles`. Contains no inline styles."""
    return _fill("verdict.html", report)


def styles() -> str:
    return "\n".join((TEMPLATES / name).read_text() for name in ("palette.css", "verdict.css"))


def _fill(template: str, report: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # captions come from outside
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "signed": _signed, "number": _number, "value": _value}
    gains, retention = ([s for s in report["suites"] if s["role"] == role] for role in ("gain", "retention"))
    suites, mean = gains + retention, report.get("mean")
    return environment.get_template(template).render(
        r={**report, "suites": suites},
        mean=mean,
        forest=forest([*suites, *([mean_row(mean)] if mean else [])]) if suites else "",
        bars=bars(suites) if suites else "",
        beside=report["diagnostics"],
        bins=TAIL_BINS,
        pair_chance=PAIR_CHANCE,
        yes_bound=YES_BOUND,
        cost=_cost(report),
        facts=_facts(report),
        retention=retention,
        gains=gains,
    )


def _cost(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "gflops_planned": ("Compute planned (MAF)", "GFLOPs"),
        "gflops_spent": ("Compute spent (MAF)", "GFLOPs"),
        "memory_ratio": ("Memory, of full fine-tuning", ""),
        "seconds": ("Training time", "s"),
        "samples": ("Samples seen", ""),
        "incumbent_kept": ("Share of the incumbent that the recipe's rank holds", ""),
    }
    rows = []
    for key, value in report["cost"].items():
        if isinstance(value, (dict, list, bool)) or value is None:
            continue
        if key.endswith("_bytes") and isinstance(value, (int, float)):
            value = f"{value / 1e6:,.0f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
        words = key.removesuffix("_bytes").removesuffix("_gflops").replace("_", " ").capitalize()
        label, unit = labels.get(key, (words, "GFLOPs" if key.endswith("_gflops") else ""))
        rows.append((label, f"{_number(value)} {unit}".strip()))
    rows.append(("Gate time", f"{report['seconds']:.1f} s"))
    return rows


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    meta, look = dict(report["meta"]), report["look"]
    number = f"number {look['number']} at this candidate" if look["made"] else NO_LOOK
    left = f"{look['left_for_others']:.2g} left for later ones"
    following = f"with {look['next']:,} items, if it is inconclusive" if look["next"] else "none, this is the last"
    rows = [
        ("Candidate", report["candidate"]),
        ("Incumbent", report["incumbent"] or "the base alone"),
        ("Base", f"{report['base']} ({str(meta.pop('base_digest', ''))[:12]})"),
        ("Look", f"{number}; {look['items']:,} of {look['needed']:,} independent items of new data"),
        ("Level of this look", f"{look['level']:.2g} for the gain, {look['loss_level']:.2g} for losses"),
        ("Spent on its gain", f"{look['spent']:.2g} of {look['alpha']:.2g}, {look['left']:.2g} left"),
        ("Next look", following),
        ("Before the next release", f"α = {report['alpha']:g}; candidate {look['candidates'] + 1}, {left}"),
        ("Time", report["created_at"]),
    ]
    if (crossing := report["cross_version"]) is not None:
        words = {"old_old": "before", "new_old": "new texts in old images", "new_new": "after"}
        shares = ", ".join(f"{_percent(crossing[name])} {each}" for name, each in words.items())
        lost = f"lower bound of the difference {_signed(crossing['ci_low'])}, margin {_percent(crossing['margin'])}"
        said = f"recall@{crossing['k']} {shares} ({lost}; {crossing['n']} texts)"
        rows.append(("Search while the catalog is embedded again", said))
    if (mean := report.get("mean")) is not None:
        rows.append(("Mean loss", f"{mean['reason']} ({mean['n']:,} items of {mean['suites']} suites)"))
    meta.pop("load_error", None)
    return [*rows, *((key.replace("_", " ").capitalize(), _value(value)) for key, value in meta.items())]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_value(child)}" for key, child in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(child) for child in value) or "none"
    return _number(jsonable(value))


def samples_of(report: Mapping[str, Any]) -> set[str]:
    worst = (worse for suite in report["suites"] for worse in suite["worst"])
    shown = (pair for pairs in report["diagnostics"]["pairs"].values() for pair in pairs["shown"])
    named = {str(worse[name]) for worse in worst for name in SAMPLES}
    return (named | {str(pair[side]["sample"]) for pair in shown for side in ("first", "second")}) - {""}


def with_samples(report: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], picture: str) -> dict[str, Any]:
    """A report with the texts and pictures of its samples. ``rows``: samples in the store by ID, with ``text``,
    ``question`` and ``answer``. ``picture``: URL of a sample's thumbnail, with ``{}`` for its ID."""

    def filled(shown: Mapping[str, Any]) -> dict[str, Any]:
        sample = shown["sample"]
        if not sample:
            return dict(shown)
        row = rows.get(sample)
        if row is None:
            return {**shown, "text": "a sample that was deleted"}
        found = {**shown, "text": row["text"], "thumbnail": picture.format(sample)}
        if "view" not in shown:
            return found
        if shown["view"] == "answer":
            found |= {"text": row["question"], "expected": row["answer"]}
        answers = {f"answer_{when}": rows.get(shown[f"sample_{when}"], {}).get("text", "") for when in BOTH}
        return found | answers

    diagnostics = report["diagnostics"]
    pairs = {
        suite: {**found, "shown": [
            {**pair, "first": filled(pair["first"]), "second": filled(pair["second"])} for pair in found["shown"]
        ]}
        for suite, found in diagnostics["pairs"].items()
    }  # fmt: skip
    suites = [{**suite, "worst": [filled(worse) for worse in suite["worst"]]} for suite in report["suites"]]
    return {**report, "suites": suites, "diagnostics": {**diagnostics, "pairs": pairs}}
