"""``ratchet gate promise`` in words: a table for each model, and what the table does not promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import typer

from core.settings import Settings
from ops.cli.terminal import printable, show_json, show_rows
from updater.gate.decision import percent, points
from updater.gate.statistics import POWER
from updater.gate.suites import Family
from updater.service.promise import Lineage, LossTest, Promise, Year, promises

_POWER: Final = (
    "Passes: the chance that such a candidate does. Power: the share of unchanged candidates that pass that test, "
    f"and the loss or gain that is excluded, detected or found with {POWER:.0%}."
)
NOT_PROMISED: Final = (
    "A loss smaller than the margins may pass at any time; only the mean loss and the audits bound what such losses "
    "add up to.",
    "What no suite asks is not protected.",
    "Items that are used again along a lineage are chosen by earlier verdicts, which raises the chance of a harmful "
    "release above alpha: see `ratchet bench gate --lineage` and docs/benchmarks. Audits look for it on sealed items.",
    "Power is that of one comparison with one model. A candidate is compared with up to three, and must pass them all.",
)


def show_promises(settings: Settings, as_json: bool) -> None:
    """Print the promise of each model as a table, or all of them as JSON."""
    found = promises(settings)
    if as_json:
        show_json({family: _data(promise) for family, promise in found.items()})
        return
    for family, promise in found.items():
        show_rows(promise_rows(promise), _title(family, promise))
        typer.echo(_POWER)
        _show_lines("Nothing is judged until these are corrected:", promise.unread)
    _show_lines("Not promised:", NOT_PROMISED)


def _show_lines(heading: str, lines: Sequence[str]) -> None:
    for line in (heading, *(f"- {each}" for each in lines)) if lines else ():
        typer.echo(printable(line))


def promise_rows(promise: Promise) -> list[dict[str, str]]:
    """One row per promise; each has the same columns."""
    rows = [_loss_row(test, f"on {test.name}", promise) for test in promise.suites]
    if promise.mean is not None:
        rows.append(_loss_row(promise.mean, f"on average over {len(promise.suites)} suites", promise))
    else:
        rows.append(_row("nothing passes: there is no retention suite with items to exclude a loss on", "candidate"))
    gain = promise.gain
    rows.append(
        _row(
            f"no gain passes {_at_most(promise)}",
            "release interval",
            f"{gain.needed:,} fresh needed, {gain.fresh:,} there",
            f"{_count(gain.candidates, 'candidate')}; the next has {percent(gain.alpha)}",
            f"detects {points(gain.detects)}",
        )
    )
    return [*rows, _lineage_row(promise), *_year_rows(promise.year)]


def _row(promised: str, per: str, items: str = "", used: str = "", power: str = "") -> dict[str, str]:
    return {"promised": promised, "per": per, "items": items, "used": used, "power": power}


def _loss_row(test: LossTest, where: str, promise: Promise) -> dict[str, str]:
    items = f"{test.units:,} judged, {test.sealed:,} sealed"
    return _row(
        f"a loss of {points(test.margin)} {where} passes {_at_most(promise)}",
        "candidate",
        items if promise.counted else f"about {items}",
        _count(test.used, "judgement"),
        f"{percent(test.power)} pass unchanged; excludes {points(test.excludes)}",
    )


def _at_most(promise: Promise) -> str:
    return f"at most {percent(promise.alpha)}"


def _lineage_row(promise: Promise) -> dict[str, str]:
    lineage = promise.lineage
    found = sorted(test.audit_finds for test in promise.suites if test.audit_finds is not None)
    power = "no sealed items"
    if found:
        power = f"finds {100 * found[0]:.1f} to {points(found[-1])} on a suite"
        if promise.mean is not None and promise.mean.audit_finds is not None:
            power += f", {points(promise.mean.audit_finds)} on average"
    return _row(
        f"an audit of what stays inside all margins fails {_at_most(promise)}",
        f"{lineage.every} releases",
        f"{promise.mean.sealed:,} sealed" if promise.mean else "",
        f"{_count(lineage.since, 'release')} since {_last(lineage)}",
        power,
    )


def _last(lineage: Lineage) -> str:
    if lineage.last_at is None:
        return "the first; no audit yet"
    outcome = "passed" if lineage.last_passed else "failed"
    return f"the audit of release {lineage.last_release}, {lineage.last_at:%Y-%m-%d}, {outcome}: {lineage.last_reason}"


def _year_rows(year: Year) -> list[dict[str, str]]:
    if not year.candidates:
        lately = "yet" if year.rejected is None else f"in {_period(year.days)}"
        return [_row(f"no number of harmful releases: nothing was judged {lately}", "year")]
    rate = f"{year.candidates:,.0f} candidates, {year.releases:,.0f} releases: the rate of {_period(year.days)}"
    rows = [
        _row(
            f"at most {year.harmful_at_most:,.1f} harmful releases, if each candidate loses just its margin on a suite",
            "year",
            used=rate,
        )
    ]
    if year.rejected is not None and year.harmful_expected is not None:
        share = f"{year.rejected:.0%} of the candidates are harmful, the share that was rejected so far"
        rows.append(_row(f"at most {year.harmful_expected:,.1f} harmful releases, if {share}", "year"))
    return rows


def _period(days: float) -> str:
    return f"the last {_count(round(days), 'day')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _title(family: Family, promise: Promise) -> str:
    measured = (
        f"from {_count(promise.verdicts, 'verdict')}" if promise.verdicts else "assumed, as there is no verdict yet"
    )
    store = "" if promise.counted else "; no sample store yet: a quarter of the items will be sealed"
    return f"{family.upper()}: independent items, spread {measured}{store}"


def _data(promise: Promise) -> dict[str, object]:
    year = promise.year
    bounds = {"harmful_at_most": year.harmful_at_most, "harmful_expected": year.harmful_expected}
    return {**asdict(promise), "year": {**asdict(year), **bounds}}
