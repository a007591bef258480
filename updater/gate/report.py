"""A verdict as `report.json` and one self-contained `report.html`, without scripts or external fonts and images. A
report holds sample IDs only; their contents are read from the store when it is shown, so a deleted sample is in no
report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jinja2

from core.artifacts import Artifacts
from core.errors import GateError
from core.files import replace_file
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.calibration import MOST_ERROR
from updater.gate.plots import bars, forest, mean_row
from updater.gate.verdict import PAIR_CHANCE, TAIL_BINS, YES_BOUND, Verdict, jsonable

JSON_NAME = "report.json"
HTML_NAME = "report.html"
NO_LOOK = "none: it could not have passed, and spent no alpha"
TEMPLATES = Path(__file__).parent / "templates"
COST = {
    "gflops_planned": ("Compute planned, memory-adjusted", "GFLOPs"),
    "gflops_spent": ("Compute spent, memory-adjusted", "GFLOPs"),
    "memory_ratio": ("Memory, as a share of full fine-tuning", ""),
    "peak_bytes": ("Peak memory of training", ""),
    "seconds": ("Training time", "s"),
    "steps": ("Training steps", ""),
    "visited": ("New samples trained on", ""),
    "passed_over": ("New samples that the budget did not pay for", ""),
    "left_out": ("Samples that could not be prepared", ""),
    "incumbent_kept": ("Share of the incumbent that the recipe's rank holds", ""),
}
"""Costs that a reader of the page may want, with labels and units; ``report.json`` has all."""
META = {
    "store_version": "Version of the sample store",
    "data_from": "Learned from, offset by partition",
    "data_to": "Learned up to, offset by partition",
    "bytes": "Size of the adapter",
}
BOTH = ("before", "after")
SAMPLES = ("sample", *(f"sample_{when}" for when in BOTH))


def write_report(verdict: Verdict, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    value = verdict.to_json()
    replace_file(directory / JSON_NAME, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    replace_file(directory / HTML_NAME, render(value).encode())


def fetch_report(settings: Settings, update: str | None = None, out: Path | None = None) -> Path:
    """Fetch the report of an update (by default the last judged one) into a local folder; returns the HTML file. Raises
    GateError: there is no verdict yet, or none for this update."""
    with closing(Ledger.open(settings.ledger)) as ledger:
        verdict = ledger.verdict_of(update) if update else next(iter(ledger.verdicts(limit=1)), None)
    if verdict is None:
        what = f"of update {update}" if update else "yet"
        raise GateError(f"there is no verdict {what}.", "See `ratchet status` for updates.")
    artifacts = Artifacts(settings.artifacts)
    folder = out or settings.home / "gate" / verdict.update_id
    folder.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, HTML_NAME):
        (folder / name).write_bytes(artifacts.read_bytes(f"reports/{verdict.update_id}/{name}"))
    return folder / HTML_NAME


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
    environment.filters |= {"percent": _percent, "signed": _signed, "moment": _moment, "number": _number}
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
        most_error=MOST_ERROR,
        cost=_cost(report),
        facts=_facts(report),
        retention=retention,
        gains=gains,
    )


def _cost(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [(label, unit, key, report["cost"][key]) for key, (label, unit) in COST.items() if key in report["cost"]]
    rows = [(label, f"{_size(value) if key == 'peak_bytes' else _number(value)} {unit}".strip())
            for label, unit, key, value in found if value is not None]  # fmt: skip
    return [*rows, ("Time of the gate", f"{report['seconds']:.1f} s")]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    meta, look = dict(report["meta"]), report["look"]
    number = f"number {look['number']} at this candidate" if look["made"] else NO_LOOK
    left = f"{look['left_for_others']:.2g} left for later ones"
    following = f"with {look['next']:,} items, if it is inconclusive" if look["next"] else "none, this is the last"
    rows = [
        ("Candidate", report["candidate"]),
        ("Incumbent", report["incumbent"] or "the base alone"),
        ("Base", f"{report['base']} ({str(meta.pop('base_digest', ''))[:12]})"),
        ("Look (interim analysis)", f"{number}; {look['items']:,} of {look['needed']:,} independent items of new data"),
        ("Level of this look", f"{look['level']:.2g} for the gain, {look['loss_level']:.2g} for losses"),
        ("Alpha spent on its gain", f"{look['spent']:.2g} of {look['alpha']:.2g}, {look['left']:.2g} left"),
        ("Next look", following),
        ("Alpha until the next release", f"{report['alpha']:g}; this is candidate {look['candidates'] + 1}; {left}"),
        ("Judged at", _moment(report["created_at"])),
    ]
    if (crossing := report["cross_version"]) is not None:
        words = {"old_old": "before", "new_old": "new texts in old images", "new_new": "after"}
        shares = ", ".join(f"{_percent(crossing[name])} {each}" for name, each in words.items())
        lost = f"lower bound of the difference {_signed(crossing['ci_low'])}, margin {_percent(crossing['margin'])}"
        said = f"recall@{crossing['k']} {shares} ({lost}; {crossing['n']} texts)"
        rows.append(("Search while the catalog is embedded again", said))
        if bridge := crossing.get("bridge"):
            said = f"{'offered' if bridge['allowed'] else 'not offered'}: recall {_percent(bridge['old_old'])} before, "
            said += (
                f"{_percent(bridge['recall'])} over it (lower bound {_signed(bridge['ci_low'])}; {bridge['n']} texts)"
            )
            rows.append(("Bridge from the incumbent's image vectors", said))
    if (mean := report.get("mean")) is not None:
        rows.append(("Mean loss", f"{mean['reason']} ({mean['n']:,} items of {mean['suites']} suites)"))
    meta.pop("load_error", None)
    if meta.get("data_from") == {}:
        meta["data_from"] = "the beginning"
    if "bytes" in meta:
        meta["bytes"] = _size(meta["bytes"])
    return [*rows, *((META.get(key, key.replace("_", " ").capitalize()), _value(value)) for key, value in meta.items())]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _moment(iso: str) -> str:
    return f"{iso[:16].replace('T', ' ')} UTC"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _size(count: float) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


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
