"""Garbage collection of adapters, carry-over, gate reports and local caches. A plan says which artifacts and local
files to delete or keep, and why; the collector deletes what it lists, in an order that is safe against a kill at any
point, and :mod:`core.ledger.collection` records it. Ages count back from the newest ledger entry, not from a clock: an
idle installation loses nothing, and a wrong clock deletes nothing."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from core import metrics
from core.artifacts import Artifacts
from core.artifacts.folder import file_size
from core.errors import LeaseLost, LedgerError, ReleaseConflict
from core.ledger import Family, Ledger, VerdictRow
from core.ledger.collection import COLLECT_LEASE, AdapterUse, JudgedUpdate
from core.ledger.leases import leased
from core.progress import progress_log
from core.settings import Settings
from serving.engines.clip_base import names_by_digest
from serving.releases.residency import read_residency
from updater.gate.sample_suites import PREFIX as MEMORY
from updater.gate.sample_suites import best_releases
from updater.service.process import work_folders

T = TypeVar("T")
Kind = Literal["adapter", "carry-over", "report", "work folder", "score cache", "engine cache"]
FOLDERS: Final[dict[Kind, str]] = {"adapter": "adapters", "carry-over": "memories", "report": "reports"}
MAX_SKEW: Final = timedelta(minutes=5)
"""A ledger entry this much ahead of the database's clock comes from a wrong clock."""
UNKNOWN: Final = "the ledger does not know it"
FRESH: Final = "fresh"
REPORT_DAYS: Final = 365.0
"""Gate reports of candidates that were never released stay for so long."""
DAY: Final = 86_400.0
LEASE_SECONDS: Final = 120.0
TRIES: Final = 3
"""A release during the decision invalidates it."""
TOGETHER: Final = 50
"""Adapters deleted between updates of the ledger and checks of the lease."""


@dataclass(frozen=True)
class Item:
    kind: Kind
    name: str
    bytes: int
    goes: bool
    reason: str

    @property
    def key(self) -> str:
        return f"{FOLDERS[self.kind]}/{self.name}"


@dataclass(frozen=True)
class CollectionPlan:
    """Items of a collection, valid while ``live`` is the live release (0: none)."""

    live: int
    items: tuple[Item, ...]

    @cached_property
    def going(self) -> list[Item]:
        return [item for item in self.items if item.goes]

    @property
    def freed(self) -> int:
        return sum(item.bytes for item in self.going)

    def summary(self) -> dict[str, Any]:
        """Counts and bytes by kind."""
        counts: dict[str, dict[str, int]] = {"goes": Counter(), "stays": Counter()}
        for item in self.items:
            counts["goes" if item.goes else "stays"][item.kind] += 1
        staying = sum(item.bytes for item in self.items if not item.goes)
        return {"freed_bytes": self.freed, "kept_bytes": staying, **{name: dict(each) for name, each in counts.items()}}


class Collector:
    """Collects the garbage of one installation. A lease in the ledger allows one collector at a time."""

    def __init__(self, settings: Settings, ledger: Ledger, artifacts: Artifacts) -> None:
        self.settings = settings
        self.ledger = ledger
        self.artifacts = artifacts

    def plan(self) -> CollectionPlan:
        """The current plan. Raises LedgerError, ArtifactsUnavailable."""
        plan = make_plan(self.settings, self.ledger, self.artifacts)
        home, days = self.settings.home, self.settings.gc.keep_days
        local = (*_work_folders(home, self.ledger), *_scores(home, days), *_engines(home, days))
        return CollectionPlan(plan.live, (*plan.items, *local))

    def run(self, actor: str = "ratchet") -> CollectionPlan | None:
        """Delete what the plan lists. None, with nothing done, while another collector or a backup is running. Raises
        LedgerError, ArtifactsUnavailable when a store is unavailable or clocks disagree. Before the first deletion
        nothing has changed; after it, the next run continues."""
        with leased(self.ledger, COLLECT_LEASE, LEASE_SECONDS) as epoch:
            return None if epoch is None else self._run(actor, epoch)

    def _run(self, actor: str, epoch: int) -> CollectionPlan:
        plan, marked = self._mark(actor, epoch)
        adapters = {item.name: item for item in plan.going if item.kind == "adapter"}
        kept = {("carry-over", name) for name in adapters.keys() - set(marked)}
        going = [item for item in plan.going if item.kind != "adapter" and (item.kind, item.name) not in kept]
        done = CollectionPlan(plan.live, (*(adapters[name] for name in marked), *going))
        for some in _parts(marked):
            self._check(epoch)
            for name in some:
                self.artifacts.delete(adapters[name].key)
            self.ledger.finish_collection({name: adapters[name].bytes for name in some})
            metrics.maintain.collected("adapter", sum(adapters[name].bytes for name in some))
        for items in _parts(going):
            self._check(epoch)
            for item in items:
                self._delete(item)
        if done.items:
            counts = done.summary()["goes"]
            self.ledger.audit(actor, "collect garbage", "artifacts", {**counts, "bytes": done.freed})
        return done

    def _mark(self, actor: str, epoch: int) -> tuple[CollectionPlan, list[str]]:
        for attempt in range(TRIES):
            plan = self.plan()
            reasons = {item.name: item.reason for item in plan.going if item.kind == "adapter"}
            try:
                return plan, self.ledger.begin_collection(reasons, live=plan.live, epoch=epoch, actor=actor)
            except ReleaseConflict as error:
                if attempt == TRIES - 1:
                    raise
                progress_log.info(f"gc: {error}")
        raise AssertionError  # unreachable

    def _check(self, epoch: int) -> None:
        if not self.ledger.renew_lease(COLLECT_LEASE, epoch, LEASE_SECONDS):
            raise LeaseLost("another collector, or a backup, took over.", "The next run goes on.")

    def _delete(self, item: Item) -> None:
        if item.kind in ("carry-over", "report"):
            self.artifacts.delete(item.key)
        else:
            path = self.settings.home / item.name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        metrics.maintain.collected(item.kind, item.bytes)


def _parts(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), TOGETHER):
        yield items[start : start + TOGETHER]


@dataclass(frozen=True)
class _Known:
    live: int
    newest: datetime
    uses: Mapping[str, AdapterUse]
    judged: Mapping[str, JudgedUpdate]
    needed: Mapping[str, str]

    def age(self, moment: datetime) -> float:
        """Age in days."""
        return (self.newest - moment) / timedelta(days=1)


def make_plan(settings: Settings, ledger: Ledger, artifacts: Artifacts) -> CollectionPlan:
    """Plan for the artifacts. The ledger is read before they are listed: what is stored meanwhile is unknown and stays.
    Raises LedgerError when the ledger is unavailable or has an entry from the future, ArtifactsUnavailable."""
    known = _read(settings, ledger)
    if known is None:
        return CollectionPlan(0, ())
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
    return CollectionPlan(known.live, tuple(items))


def _read(settings: Settings, ledger: Ledger) -> _Known | None:
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
    """Carry-over stays with adapters that stay and were released, or are undecided: an update may begin from them."""
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
    update = known.judged.get(update_id)
    if update is None:
        return False, "the ledger has no verdict of it"
    use = known.uses.get(update.adapter)
    if use is not None and use.released:
        return False, "its adapter was released"
    if update.adapter in known.needed:
        return False, f"its adapter stays: {known.needed[update.adapter]}"
    age = known.age(update.judged_at)
    if age < REPORT_DAYS:
        return False, f"judged {age:.0f} days ago"
    return True, f"judged {age:.0f} days ago, never released"


def needed_adapters(ledger: Ledger, settings: Settings) -> dict[str, str]:
    """Adapters to keep, with a reason each: in service, needed for a rollback or base switch, the gate, or
    undecided."""
    needed: dict[str, str] = {}
    for name, reason in _reasons(ledger, settings):
        if name is not None:
            needed.setdefault(name, reason)
    return needed


def _reasons(ledger: Ledger, settings: Settings) -> Iterator[tuple[str | None, str]]:
    yield from ledger.adapters_in_use().items()
    bases = ledger.released_bases()
    for base in {None, *bases}:
        yield from _resident(ledger, settings, base)
    for row in ledger.newest_of_each_base():
        yield row.clip, f"release {row.number} is the newest of its base"
    for base in ledger.upgrade_bases():
        upgrade = ledger.approved_upgrade(base)
        if upgrade is not None:
            yield ledger.update(upgrade.update_id).adapter, f"{upgrade.update_id} may be switched to"
    for family in ("clip", "vlm"):
        for update in ledger.updates(1, family):
            yield update.adapter, f"{update.id} is the newest of its family, and may be judged again"
    for name in settings.gc.keep_adapters:
        yield name, "gc.keep_adapters names it"


def _resident(ledger: Ledger, settings: Settings, base: str | None) -> Iterator[tuple[str | None, str]]:
    """Adapters that answer or that a rollback returns to, in releases of one base; None: of all."""
    size = max(settings.gc.keep_releases, settings.serve.rollback_window)
    rows = read_residency(ledger, size, base)
    for row in rows.answering:
        yield from ((name, f"release {row.number} answers") for name in (row.clip, row.vlm))
    for row in rows.window:
        yield from ((name, f"release {row.number} is one of the newest") for name in (row.clip, row.vlm))
    live = ledger.live()
    stable = None if live is None else ledger.incumbent(live.number + 1, base)
    if stable is None:
        return
    families: tuple[Family, ...] = ("clip", "vlm")
    for family in families:
        before = ledger.before(family, stable.adapter(family), base)
        if before is not None:
            yield before.adapter(family), f"a rollback of release {stable.number} goes back to it"
    yield from ((name, "replicas keep it for a rollback") for name in (*rows.clips, *rows.vlms))


def best_adapters(ledger: Ledger, family: str, base: str) -> dict[str, str]:
    """Released adapters of a base with the highest score on any suite; candidates are compared with them."""
    verdicts = ledger.released_verdicts(family, base)
    judged = [pair for verdict in verdicts for pair in verdict.summary.get("suites", {}).items()]
    names = {name for name, suite in judged if suite.get("role") != "gain" or name.startswith(FRESH)}
    # The fresh suite of a domain also stands for its memory suite.
    names |= {f"{MEMORY}{name.removeprefix(FRESH)}" for name in names if name.startswith(FRESH)}
    asked = {tuple(sorted(_fixed(verdict))) for verdict in verdicts}
    best: dict[str, str] = {}
    for name in {name for fixed in asked for name in best_releases(verdicts, fixed, (), None).values()}:
        best[name] = "best release on average"
    for suite in sorted(names):
        for name in best_releases(verdicts, (), [suite], None).values():
            best.setdefault(name, f"best release on {suite}")
    return best


def _fixed(verdict: VerdictRow) -> list[str]:
    """Retention suites over folders."""
    suites = verdict.summary.get("suites", {}).items()
    return [name for name, suite in suites if suite.get("role") == "retention" and not name.startswith(MEMORY)]


def _work_folders(home: Path, ledger: Ledger) -> Iterator[Item]:
    for path in work_folders(home):
        over = ledger.is_finished(path.name)
        reason = "its update is over" if over else "its update goes on from it, or is not known"
        size = sum(file_size(each) for each in path.rglob("*"))
        yield Item("work folder", path.relative_to(home).as_posix(), size, over, reason)


def _scores(home: Path, keep_days: float) -> Iterator[Item]:
    for path in sorted((home / "cache" / "gate").rglob("*.npz")):
        age = _days_unused(path)
        goes, reason = age >= keep_days, f"not used for {age:.0f} days"
        yield Item("score cache", path.relative_to(home).as_posix(), file_size(path), goes, reason)


def _engines(home: Path, keep_days: float) -> Iterator[Item]:
    """Graphs and measurements of bases; names begin with 12 digits of the base's digest."""
    digests = {digest[:12] for digest in names_by_digest(home)}
    for path in sorted((home / "engines").glob("[0-9a-f]" * 12 + "*")):
        age, known = _days_unused(path), path.name[:12] in digests
        reason = "its base is registered" if known else f"its base is not registered, not used for {age:.0f} days"
        size = sum(file_size(each) for each in (path, *path.rglob("*")))
        yield Item("engine cache", path.relative_to(home).as_posix(), size, not known and age >= keep_days, reason)


def _days_unused(path: Path) -> float:
    try:
        return (time.time() - path.stat().st_mtime) / DAY
    except FileNotFoundError:
        return 0.0


def largest_first(items: Iterable[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (-item.bytes, item.kind, item.name))
