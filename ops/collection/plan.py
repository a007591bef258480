"""What of the artifacts goes and what stays, and why. Nothing is deleted here.

Ages are counted back from the newest entry of the ledger, not from a clock: an installation that rests loses nothing,
and a machine whose clock is wrong deletes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Final, Literal

from core.artifacts import Artifacts
from core.errors import LedgerError
from core.ledger import Ledger
from core.ledger.collection import AdapterUse, JudgedUpdate
from core.settings import Settings
from ops.collection.keep import best_adapters, needed_adapters

Kind = Literal["adapter", "carry-over", "report", "work folder", "score cache", "engine cache"]
FOLDERS: Final[dict[Kind, str]] = {"adapter": "adapters", "carry-over": "memories", "report": "reports"}
"""Of the artifacts."""
MAX_SKEW: Final = timedelta(minutes=5)
"""An entry of the ledger that is so much younger than the database's clock is one of a clock that is wrong."""
UNKNOWN: Final = "the ledger does not know it"


@dataclass(frozen=True)
class Item:
    """One directory or file, and what becomes of it."""

    kind: Kind
    name: str
    bytes: int
    goes: bool
    reason: str

    @property
    def key(self) -> str:
        """Of the artifacts."""
        return f"{FOLDERS[self.kind]}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """What may be deleted as long as release ``live`` is the live one (0: none)."""

    live: int
    items: tuple[Item, ...]

    @cached_property
    def going(self) -> list[Item]:
        """What goes."""
        return [item for item in self.items if item.goes]

    @property
    def freed(self) -> int:
        """Bytes of it."""
        return sum(item.bytes for item in self.going)

    def summary(self) -> dict[str, Any]:
        """Counts and bytes by kind, for machines."""
        counts: dict[str, dict[str, int]] = {"goes": Counter(), "stays": Counter()}
        for item in self.items:
            counts["goes" if item.goes else "stays"][item.kind] += 1
        staying = sum(item.bytes for item in self.items if not item.goes)
        return {"freed_bytes": self.freed, "kept_bytes": staying, **{name: dict(each) for name, each in counts.items()}}


@dataclass(frozen=True)
class _Known:
    """What the ledger says."""

    live: int
    newest: datetime
    uses: Mapping[str, AdapterUse]
    judged: Mapping[str, JudgedUpdate]
    needed: Mapping[str, str]

    def age(self, time: datetime) -> float:
        """Days."""
        return (self.newest - time) / timedelta(days=1)


def make_plan(settings: Settings, ledger: Ledger, artifacts: Artifacts) -> Plan:
    """What goes and what stays of the artifacts. The ledger is read before they are listed: what is stored meanwhile is
    not known to it, and stays.

    Raises:
        LedgerError: the ledger has an entry of the future, or is away.
        ArtifactsUnavailable: the artifacts cannot be listed.
    """
    known = _read(settings, ledger)
    if known is None:
        return Plan(0, ())
    listed = {kind: artifacts.sizes(folder) for kind, folder in FOLDERS.items()}
    for use in known.uses.values():
        if use.collected_at is not None and use.collected_bytes is None:
            listed["adapter"].setdefault(use.name, 0)
    adapters = {name: _adapter(settings, known, name) for name in {*known.uses, *listed["adapter"]}}
    items = [Item("adapter", name, size, *adapters[name]) for name, size in sorted(listed["adapter"].items())]
    for name, size in sorted(listed["carry-over"].items()):
        items.append(Item("carry-over", name, size, *_carry_over(known, name, adapters.get(name))))
    for name, size in sorted(listed["report"].items()):
        items.append(Item("report", name, size, *_report(settings, known, name, adapters)))
    return Plan(known.live, tuple(items))


def _read(settings: Settings, ledger: Ledger) -> _Known | None:
    """None for a ledger without an entry."""
    newest, clock = ledger.newest_entry(), ledger.clock()
    if newest is None:
        return None
    if newest > clock + MAX_SKEW:
        raise LedgerError(
            f"the ledger has an entry of {newest:%Y-%m-%d %H:%M:%S} UTC, and its clock says {clock:%Y-%m-%d %H:%M:%S}.",
            "Nothing is collected. Set the clocks of all machines right (NTP).",
        )
    live = ledger.live()
    uses = {use.name: use for use in ledger.adapter_uses()}
    needed = needed_adapters(ledger, settings)
    for family, base in sorted({(use.family, use.base) for use in uses.values()}):
        needed = best_adapters(ledger, family, base) | needed
    judged = {update.id: update for update in ledger.judged_updates()}
    return _Known(live.number if live else 0, newest, uses, judged, needed)


def _adapter(settings: Settings, known: _Known, name: str) -> tuple[bool, str]:
    use = known.uses.get(name)
    if use is None:
        return False, UNKNOWN
    if use.collected_at is not None:
        if use.collected_bytes is None:
            return True, "its collection was interrupted"
        return False, "it is here again after it was collected"
    if name in known.needed:
        return False, known.needed[name]
    age = known.age(use.last_used)
    if age < settings.gc.keep_days:
        return False, f"used {age:.0f} days ago"
    return True, f"not used for {age:.0f} days"


def _carry_over(known: _Known, name: str, adapter: tuple[bool, str] | None) -> tuple[bool, str]:
    """An update may begin from an adapter that stays and was released, or that is not decided."""
    use = known.uses.get(name)
    if use is None or adapter is None:
        return False, UNKNOWN
    goes, reason = adapter
    if goes or use.collected_at is not None:
        return True, "its adapter goes"
    if use.released or name in known.needed:
        return False, f"its adapter stays: {reason}"
    return True, "its adapter was not released: no update begins from it"


def _report(
    settings: Settings, known: _Known, update_id: str, adapters: Mapping[str, tuple[bool, str]]
) -> tuple[bool, str]:
    update, days = known.judged.get(update_id), settings.gc.keep_report_days
    if update is None:
        return False, "the ledger has no verdict of it"
    use = known.uses.get(update.adapter)
    if use is not None and use.released:
        return False, "its adapter was released"
    if update.adapter in known.needed:
        return False, f"its adapter stays: {known.needed[update.adapter]}"
    age = known.age(update.judged_at)
    if not days or age < days:
        return False, f"judged {age:.0f} days ago"
    return True, f"judged {age:.0f} days ago, never released"


def largest_first(items: Iterable[Item]) -> list[Item]:
    """For people."""
    return sorted(items, key=lambda item: (-item.bytes, item.kind, item.name))
