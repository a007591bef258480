"""Looks at candidates, from what the ledger has of them: what the next one may spend, and whether one is due.

A candidate that was inconclusive is kept, and asked again when more fresh items have arrived. Each further look is an
update of its own that is trained already, as an import is: same adapter, recipe and data, another version of the store.
So nothing of it is lost or repeated when the updater is killed, and each look has its verdict and its report.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.ledger import Ledger, UpdateRow, VerdictRow
from core.settings.updates import Gate as GateSettings
from updater.gate.interim_analyses import RANK_EFFICIENCY, Plan, candidate_alpha, needed_items

RECENT = 10
"""Verdicts from which the spread of the rank statistic is taken."""
TRAINED_BY = "trained_by"
"""In the cost of a further look: the update that trained the candidate, and whose cost it is."""
ONLY_LOOK = "only_look"
"""In the cost of an update that is judged once, by what there is, and not kept, as an import is: see
:class:`updater.service.triggers.Ready`."""
LOOK = re.compile(r"^(?P<first>.+)-look-(?P<number>\d+)$")


@dataclass(frozen=True)
class KeptCandidate:
    """An inconclusive candidate that is asked again."""

    update: UpdateRow
    """Its newest look."""
    verdict: VerdictRow
    next_items: int
    """Fresh items with which that is due."""
    needed: int
    """Those of the last look."""
    seen: int
    """Those of the newest look."""

    @property
    def next_id(self) -> str:
        """Id of the update that is the next look."""
        first, number = split_id(self.update.id)
        return f"{first}-look-{number + 1}"


def split_id(update_id: str) -> tuple[str, int]:
    """The update that trained or imported a candidate, and which time it is asked: 1 by that update itself."""
    match = LOOK.match(update_id)
    return (match["first"], int(match["number"])) if match else (update_id, 1)


def plan(settings: GateSettings, ledger: Ledger, family: str, update: UpdateRow | None, *, halved: bool) -> Plan:
    """What is settled about a candidate before its next look; the first look settles it for all.

    Args:
        update: the look; None: of a candidate that will be trained.
        halved: only half of the fresh items are asked, because a search looks at the other half.
    """
    verdicts = ledger.looks_since_release(family)
    candidate = None if update is None else split_id(update.id)[0]
    own = [verdict.summary["look"] for verdict in verdicts if split_id(verdict.update_id)[0] == candidate]
    if own:
        first, looked_at = own[0], tuple(look["items"] for look in own)
        loss_alpha = first.get("loss_alpha", first["alpha"])  # looks of earlier versions had one alpha
        return Plan(first["alpha"], loss_alpha, first["needed"], looked_at, first["candidates"])
    others = len({split_id(verdict.update_id)[0] for verdict in verdicts})
    alpha = candidate_alpha(settings.alpha, others)
    needed = needed_items(
        spread(ledger.verdicts_of(family)),
        detect=settings.detect,
        alpha=alpha,
        power=settings.power,
        fewest=settings.min_items,
        most=settings.max_items // (2 if halved else 1),
    )
    return Plan(alpha, settings.alpha, needed, (), others, only=update is not None and _only_look(ledger, update))


def _only_look(ledger: Ledger, update: UpdateRow) -> bool:
    """An upgrade to another base, too: further looks are updates, and those are of the base that is live."""
    return bool(update.cost.get(ONLY_LOOK)) or ledger.base_upgrade(update.id) is not None


def spread(verdicts: Sequence[VerdictRow]) -> float | None:
    """Standard deviation of one item's difference, pooled over the newest verdicts that have one; None: none has.

    It is the larger one of the statistic's and of the hits' over what the statistic is worth: ``gate.detect`` is in
    points that users see, and a gain of 3 points of recall can be less than 3 points of 1/log2(2 + rank).
    """
    gains: list[Mapping[str, Any]] = [verdict.summary.get("gain") or {} for verdict in verdicts]
    measured = [gain for gain in gains if gain.get("spread") and gain["units"] > 1][:RECENT]
    units = sum(gain["units"] for gain in measured)
    if not units:
        return None
    variances = (
        max(gain["spread"] ** 2, gain["recall_spread"] ** 2 / RANK_EFFICIENCY) * gain["units"] for gain in measured
    )
    return math.sqrt(sum(variances) / units)


def kept_candidate(ledger: Ledger, updates: Sequence[UpdateRow], incumbent: str | None) -> KeptCandidate | None:
    """The candidate that is asked again; None where there is none.

    It is the newest update's: a newer one ends it, and so does another incumbent, a look with all the items that are
    needed, and a guard that withdrew it.

    Args:
        updates: of its family, newest first.
    """
    update = updates[0] if updates else None
    if update is None or update.state != "done" or update.incumbent != incumbent:
        return None
    verdict = ledger.verdict_of(update.id)
    look = verdict.summary.get("look") if verdict is not None and verdict.outcome == "inconclusive" else None
    if verdict is None or look is None or look["next"] is None or ledger.withdrawn([update.adapter]):
        return None
    others = look["items"] - look["fresh"]  # of the user's gain suites: they stay
    return KeptCandidate(update, verdict, max(0, look["next"] - others), max(0, look["needed"] - others), look["fresh"])
