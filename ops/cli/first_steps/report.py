"""What `ratchet init` says about pictures and suites."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.settings import Settings
from ops.cli.cells import printable
from ops.cli.first_steps.labelled import LabelledSample
from ops.cli.first_steps.power import SuitePower, fresh_needed
from ops.cli.first_steps.suite_files import Division
from updater.gate.statistics import POWER

EXAMPLES = 3
"""Rows that cannot be used of which the reason is shown."""


def tell_sample(console: Console, sample: LabelledSample, division: Division) -> None:
    """How many pictures there are, on which side, and which cannot be used."""
    held_out, rest = len(division.held_out), len(division.rest)
    console.print(
        Text(f"data     {sample.listed:,} pictures: {held_out:,} held out for suites, {rest:,} are a reference pool")
    )
    if sample.unusable:
        first = "".join(f"\n         {printable(why)}" for why in sample.unusable[:EXAMPLES])
        console.print(Text(f"         {len(sample.unusable):,} cannot be used:{first}"))


def tell_suites(console: Console, settings: Settings, powers: list[SuitePower]) -> None:
    """What each suite can show, and with how many new pairs a gain does."""
    gate = settings.gate
    table = Table("suite", "items", "independent", "excludes a loss of", "margin", "enough")
    for each in powers:
        shown = f"{100 * each.excludes:.1f} points", f"{100 * each.margin:.1f}", "yes" if each.enough else "no"
        table.add_row(each.suite.name, f"{each.items:,}", f"{each.units:,}", *shown)
    console.print(table)
    console.print(Text(f"         with a chance of {POWER:.0%}, where an update changes nothing; a larger loss shows"))
    for each in powers:
        if each.advice:
            console.print(Text(f"         {each.suite.name}: {each.advice}", style="yellow"))
    needed, share = fresh_needed(gate), settings.ingest.fresh_eval_share
    pairs = f", about {needed / share:,.0f} new pairs ({share:.0%} of them are never trained on)" if share else ""
    console.print(
        Text(f"gain     one of {100 * gate.detect:g} points (gate.detect) shows with {needed:,} fresh items{pairs}")
    )
