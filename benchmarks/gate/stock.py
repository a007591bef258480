"""Candidates with their outcomes, from a workshop that trains them, or from stored outcomes."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.cases import Case, Outcomes, Rule, has_ranks, hits_of, judged_of
from benchmarks.gate.margin import WITHIN, beside, parents_of
from benchmarks.gate.plans import MARGIN, NEW, GatePlan
from benchmarks.gate.trial import Trial, Workshop, fresh, fresh_name, run_all
from core.errors import ConfigError
from updater.gate.suites import Suite, load_suites

ARCHIVE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gate" / "outcomes.tar.xz"
Ranks = NDArray[np.int32]
"""[items, views]: 0-based ranks of the right answers."""


@dataclass(frozen=True, slots=True)
class Items:
    """Numbers of one suite's items."""

    served: int
    """In service."""
    shown: int
    """In service or drawn again: as many, if enough remain to determine the truth."""
    everything: int


@dataclass(frozen=True, slots=True)
class Stock:
    cases: list[Case]
    margin: list[Case]
    """Scaled candidates near the margin."""
    items: Mapping[str, Items]
    not_trained: Mapping[str, str]
    """Messages of the trainer by candidate."""
    seconds: float
    """Of training the candidates, and of their answers; 0 for stored outcomes."""


def trained(workshop: Workshop, wanted: Sequence[GatePlan], parents: int, tries: int, rule: Rule) -> Stock:
    """All candidates of a workshop; what its folder holds is not trained again. Raises RatchetError."""
    trials = dict(run_all(workshop, wanted))
    cases = [each for plan in wanted if (each := case(workshop, plan, trials)) is not None]
    margin = list(at_margin(workshop, wanted, trials, parents, tries, rule))
    return Stock(
        cases,
        margin,
        items_of(workshop),
        {name: trial.error for name, trial in trials.items() if trial.error},
        round(sum(trial.seconds for trial in trials.values()), 1),
    )


def items_of(workshop: Workshop) -> dict[str, Items]:
    return {name: Items(one.held_out, one.shown, one.n) for name, one in workshop.populations.items()}


def case(workshop: Workshop, plan: GatePlan, trials: Mapping[str, Trial]) -> Case | None:
    """A candidate's outcomes with its incumbent's and the base's; None if training refused it."""
    answers = {name: trial.answers for name, trial in trials.items() if not trial.error}
    return case_of(plan, answers, workshop.suites(plan.domain), items_of(workshop)) if plan.name in answers else None


def case_of(
    plan: GatePlan, answers: Mapping[str, Outcomes], suites: tuple[Suite, ...], items: Mapping[str, Items]
) -> Case:
    after, base = answers[plan.name], answers["base"]
    before = answers[plan.incumbent] if plan.incumbent else base
    sides = [base, before, after]
    if not all(has_ranks(side[suite.name]) for suite in suites for side in sides):  # some were kept as hits
        alike: dict[int, Outcomes] = {
            id(side): {suite.name: hits_of(suite, side[suite.name]) for suite in suites} for side in sides
        }
        sides = [alike[id(side)] for side in sides]
    judged = {suite.name: judged_of(items[suite.name].served) for suite in suites}
    return Case(plan.name, plan.kind, suites, judged, *sides)


def at_margin(
    workshop: Workshop, wanted: Sequence[GatePlan], trials: dict[str, Trial], parents: int, tries: int, rule: Rule
) -> Iterator[Case]:
    """Scaled candidates near the margin; their trials are added to ``trials``."""
    usable = [plan for plan in wanted if not trials[plan.name].error]
    for parent in parents_of(usable, parents):

        def loses(plan: GatePlan, parent: GatePlan = parent) -> float:
            trials[plan.name] = workshop.of_scaled(plan, parent)
            return _case(workshop, plan, trials).beyond(rule)

        whole = _case(workshop, parent, trials)
        none = replace(whole, after=whole.base).beyond(rule)
        for plan in beside(parent, loses, whole.beyond(rule), none, tries):
            yield _case(workshop, plan, trials)


def _case(workshop: Workshop, plan: GatePlan, trials: Mapping[str, Trial]) -> Case:
    found = case(workshop, plan, trials)
    assert found is not None, f"{plan.name} was trained"
    return found


def stored(place: Path, wanted: Sequence[GatePlan], parents: int, rule: Rule) -> Stock:
    """Those candidates whose outcomes a run of the benchmark left in ``place``, an archive or a folder; nothing is
    trained, and scaled candidates are taken as they are. How many items a suite has in service is in results.json
    next to ``place``. Raises ConfigError when there is nothing, or it is of other suites.
    """
    answers = dict(read_trials(place))
    items = _stored_items(place.parent / "results.json")
    suites = [suite for suite in load_suites([], None, "clip") if suite.role == "retention"]
    plans = {plan.name: plan for plan in wanted if {plan.name, plan.incumbent or "base"} <= answers.keys()}
    named = [suite.name for suite in suites] + [fresh_name(domain) for domain in NEW]
    lengths = {name: len(ranks) for name, ranks in answers.get("base", {}).items()}
    old = any(ranks.dtype == np.uint8 for ranks in answers.get("base", {}).values())  # hits alone
    if not plans or old or lengths != {name: items[name].everything for name in named if name in items}:
        raise ConfigError(
            f"{place} holds no outcomes of the base and of candidates on the items of the results.json next to it.",
            "Name the archive, or the folder `outcomes`, of one run of `ratchet bench gate`.",
        )

    def asked(plan: GatePlan) -> tuple[Suite, ...]:
        return *suites, fresh(Path(), plan.domain)

    def of(plan: GatePlan) -> Case:
        return case_of(plan, answers, asked(plan), items)

    chosen = {plan.name: plan for plan in parents_of(list(plans.values()), parents)}
    scaled = [
        replace(chosen[parent], name=name, kind=MARGIN)
        for name in sorted(answers)
        if (parent := name.partition("x")[0]) in chosen and re.search(r"x\d", name)
    ]
    margin = [one for one in map(of, scaled) if abs(one.beyond(rule)) <= WITHIN]
    return Stock([of(plan) for plan in plans.values()], margin, items, {}, 0.0)


def _stored_items(path: Path) -> dict[str, Items]:
    try:
        return {name: Items(*counts) for name, counts in json.loads(path.read_text())["items"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not say how many items suites have: {error!r}.", "Keep it there.") from None


def read_trials(place: Path) -> Iterator[tuple[str, Mapping[str, Ranks]]]:
    for name, content in _files(place):
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {suite: file[suite] for suite in file.files if suite != "about"}
        if arrays:  # none where training refused the candidate
            yield name, arrays


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    if place.is_dir():
        for path in sorted(place.glob("*.npz")):
            yield path.stem, path.read_bytes()
        return
    try:
        with tarfile.open(place) as archive:
            for member in archive:
                extracted = archive.extractfile(member) if re.search(r"[\w-]+\.npz$", member.name) else None
                if extracted is not None:
                    yield Path(member.name).stem, extracted.read()
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"outcomes cannot be read: {error}.", "Name a folder or archive with --outcomes.") from None
