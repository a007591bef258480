"""Upgrades to another CLIP base: an update that learns the old base's data on the new one, and its release.

An upgrade's data begin at the start and end where the live adapter's do. The updater trains, judges and stores it like
any update, but does not propose it, because the running encoders have the old base: a switch releases it. Its adapter
starts at zero, and nothing is distilled from the old model. Servers answer with the newest release of their base
(``base.clip``): those of the old base continue unchanged.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from core.artifacts import Artifacts
from core.digests import digest12, digest_json
from core.errors import BaseModelError, ConfigError, ReleaseError, TrainingError
from core.ledger import Ledger, ReleaseRow, UpdateRow, VerdictRow
from core.progress import progress_log, step
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, digest_of, list_bases, load_base
from streams.store.sample_store import SampleStore
from updater.bases import reference_of
from updater.data.draw import HAVING
from updater.data.mixture import plan_batches
from updater.data.pools import draw_pools, mixed_seed
from updater.recipes import Recipe, family_recipe
from updater.service.process import StopSignal, only_one
from updater.service.triggers import Learned
from updater.service.update_loop import UpdaterService, waits_for_base
from updater.training.result import Estimate, Limits
from updater.training.train import estimate
from updater.training.workers import Stopped

SUFFIX = ".upgrade"
"""Appended to the recipe's name, so that the upgrade does not count as an attempt of the recipe itself."""


@dataclass(frozen=True)
class UpgradePlan:
    old: ClipBase
    new: ClipBase
    recipe: Recipe
    incumbent: str | None
    store_version: int
    data_to: Mapping[str, int]
    samples: int
    seed: int
    gflops: float
    training: Estimate
    embedded: int

    def rows(self) -> list[tuple[str, str]]:
        """Labels and values for display. Properties that both bases share are left out."""
        old, new, training = self.old, self.new, self.training
        facts = {
            "base": (f"{old.name} ({digest12(old.digest)})", f"{new.name} ({digest12(new.digest)})"),
            "dimension": (old.dim, new.dim),
            "image size": (f"{old.preprocess.size} px", f"{new.preprocess.size} px"),
            "text length": (f"{old.context_length} tokens", f"{new.context_length} tokens"),
            "tokenizer": (digest12(old.tokenizer_digest), digest12(new.tokenizer_digest)),
            "weights": (f"{old.weights_bytes / 1e6:,.1f} MB", f"{new.weights_bytes / 1e6:,.1f} MB"),
        }
        visited, again = min(training.visited, self.samples), self.embedded * training.sample_gflops
        return [
            *((what, f"{before} -> {after}") for what, (before, after) in facts.items() if before != after),
            ("incumbent", self.incumbent or f"{old.name} alone"),
            ("recipe", self.recipe.name),
            ("to learn again", f"{self.samples:,} samples"),
            ("visited within the budget", f"{visited:,} samples, {training.steps:,} steps"),
            ("budget", f"{training.gflops:,.0f} of {self.gflops:,.0f} MAF-GFLOPs"),
            ("time of training", f"about {training.seconds / 60:,.0f} minutes here, at full duty"),
            ("to embed after the switch", f"{self.embedded:,} samples, {again:,.0f} GFLOPs"),
        ]


def plan_upgrade(settings: Settings, name: str, gflops: float | None = None) -> UpgradePlan:
    """Plan an upgrade from the live base to the registered base ``name``, and measure its cost; nothing is recorded.
    Its data are those that the live adapter has learned, or the whole store if that is nothing. The recipe is that of
    the settings, with enough steps to visit each sample once. One batch is measured on the new base. ``gflops``:
    budget; by default that of a day.

    Raises:
        BaseModelError: there is no such base, or it is the live one.
        ConfigError: the budget is not a positive number.
        TrainingError: the live release has another base than the settings, an upgrade waits, or there is no sample.
        BudgetError: the budget does not pay for one step.
    """
    if gflops is not None and not (math.isfinite(gflops) and gflops > 0):
        raise ConfigError(f"--budget {gflops} is not a budget.", "Give MAF-GFLOPs above 0, e.g. --budget 200000.")
    old, new = load_base(settings.home, settings.base.clip), _registered(settings, name)
    if new.digest == old.digest:
        raise BaseModelError(f"base {name!r} is the one that is live ({digest12(old.digest)}).", "Name another one.")
    store = SampleStore(settings.lake)
    with closing(Ledger.open(settings.ledger)) as ledger:
        if waiting := waits_for_base(ledger, settings.home, old):
            raise TrainingError(f"{waiting}.", "Then upgrade.")
        learned = Learned.of(ledger, store, "clip")
    version = learned.store_version
    data_to = learned.data_from or store.reached(version)
    everything, pending = (
        store.count(version=version, split="train", after=after, having=HAVING["clip"]) for after in ({}, data_to)
    )
    samples = everything - pending
    if samples < 1:
        raise TrainingError(
            "the store has no training sample with a text that could be learned again.",
            f"With nothing learned there is nothing to replay: set base.clip={name} and start with a new home.",
        )
    recipe = family_recipe(settings, "clip")
    sizes = {"new": samples, "reference": int(recipe.mixture.reference > 0), "replay": 0}
    new_rows = plan_batches(recipe.mixture, recipe.batch_size, sizes, 0).counts["new"]  # type: ignore[arg-type]
    steps = max(recipe.max_steps, math.ceil(samples / new_rows))
    longer = recipe.model_copy(update={"name": recipe.name[: 64 - len(SUFFIX)] + SUFFIX, "max_steps": steps})
    seed, gflops = mixed_seed(0, version), gflops or settings.budget.gflops_per_day
    limits = Limits(
        gflops=gflops, seconds=math.inf, threads=settings.updater.threads,
        work_bytes=settings.updater.work_gib * 2**30,
    )  # fmt: skip
    # No replay: nothing was learned on the new base.
    pools = draw_pools(
        store, longer, reference_of(settings, "clip"), version, {}, seed, settings.updater.draw, data_to
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ratchet-plan-") as folder:
        training = estimate(new, longer, pools, seed=seed, limits=limits, work_dir=Path(folder))
    return UpgradePlan(
        old, new, longer, learned.incumbent, version, data_to, samples, seed, gflops, training,
        store.count(version=version),
    )  # fmt: skip


def _registered(settings: Settings, name: str) -> ClipBase:
    if name in list_bases(settings.home, "vlm"):
        raise BaseModelError(
            f"base {name!r} is a VLM, and only the CLIP's base can be upgraded.",
            "For a VLM register the new one, set base.vlm, and begin with a new home.",
        )
    if name not in list_bases(settings.home, "clip"):
        known = ", ".join(list_bases(settings.home, "clip")) or "none"
        raise BaseModelError(
            f"there is no base {name!r}; registered CLIPs: {known}.",
            f"Register it first: `ratchet base add {name} --model ...`.",
        )
    return load_base(settings.home, name)


def begin_upgrade(settings: Settings, plan: UpgradePlan, actor: str) -> UpdateRow:
    """Record an upgrade; the updater of this home takes it as its next update. Raises LedgerError, StoreError."""
    values = plan.recipe.model_dump(mode="json")
    with closing(Ledger.open(settings.ledger)) as ledger:
        newest = ledger.updates(1)
        what = [
            plan.old.digest, plan.new.digest, values, plan.seed, plan.store_version, plan.data_to,
            plan.incumbent, plan.gflops, newest[0].id if newest else None,
        ]  # fmt: skip
        update = ledger.begin_base_upgrade(
            f"upgrade-{digest12(digest_json(what))}",
            recipe=values,
            seed=plan.seed,
            store_version=plan.store_version,
            data_to=dict(plan.data_to),
            incumbent=plan.incumbent,
            old=(plan.old.digest, plan.old.name),
            new=(plan.new.digest, plan.new.name),
            gflops=plan.gflops,
            actor=actor,
        )
    SampleStore(settings.lake).pin(update.id, update.store_version)
    return update


def begun(settings: Settings, name: str) -> UpdateRow | None:
    """The unfinished upgrade to a base, or None. Raises TrainingError if there is one to another base."""
    with closing(Ledger.open(settings.ledger)) as ledger:
        return _unfinished(ledger, name)


def _unfinished(ledger: Ledger, name: str) -> UpdateRow | None:
    update = ledger.unfinished_update("clip")
    upgrade = None if update is None else ledger.base_upgrade(update.id)
    if update is None or upgrade is None:
        return None
    if upgrade.new_name != name:
        raise TrainingError(
            f"{update.id} to the base {upgrade.new_name!r} is not finished.",
            f"Finish it (`ratchet base upgrade {upgrade.new_name}`) or drop it (the same with --cancel).",
        )
    return update


def finish_upgrade(settings: Settings, update_id: str) -> tuple[UpdateRow, VerdictRow | None]:
    """Train and judge an upgrade in this process, resuming where it is; SIGTERM stops it at a checkpoint. Raises
    TrainingError: an updater runs here, which will take the upgrade itself; or it waits for something."""
    stop = StopSignal()
    with closing(Ledger.open(settings.ledger)) as ledger:
        with only_one(settings.home, wait=False):
            stop.install()
            service = UpdaterService(settings, family="clip", stop=stop)
            with suppress(Stopped):
                while not ledger.is_finished(update_id):
                    outcome = service.step()
                    if outcome.update is None:
                        raise TrainingError(f"{update_id} waits: {outcome.reason}.", "Run the command again later.")
            if not ledger.is_finished(update_id):
                progress_log.info(f"{update_id} stops; it goes on from its checkpoint next time")
        return ledger.update(update_id), ledger.verdict_of(update_id)


def cancel_upgrade(settings: Settings, name: str) -> UpdateRow:
    """Drop the upgrade to a base, before or after training. Raises TrainingError if there is none, or an updater works
    on it."""
    with closing(Ledger.open(settings.ledger)) as ledger, only_one(settings.home, wait=False):
        update = _unfinished(ledger, name)
        if update is None:
            approved = ledger.approved_upgrade()
            if approved is None or approved.new_name != name:
                raise TrainingError(f"no upgrade to the base {name!r} is under way.", "See `ratchet status`.")
            update = ledger.update(approved.update_id)
        SampleStore(settings.lake).unpin(update.id)
        update = ledger.advance_update(update.id, "abandoned", error="the upgrade was cancelled")
    shutil.rmtree(settings.update_folders / update.id, ignore_errors=True)
    return update


@dataclass(frozen=True)
class Switch:
    live: ReleaseRow
    live_base: str
    base: ClipBase
    clip: str | None
    update_id: str | None
    """The upgrade that made the adapter; None for a return to an earlier release's."""


def plan_switch(settings: Settings, ledger: Ledger, name: str) -> Switch:
    """Find the release of a switch to the base ``name``: its newest upgrade that passed the gate or, without one, the
    adapter of its newest full release. Raises BaseModelError: there is no such base, or it is live; ReleaseError:
    nothing of that base may be released, or something else has to be decided first."""
    base = load_base(settings.home, name)
    live = ledger.live()
    if live is None:
        raise ReleaseError("nothing is released yet.", f"Set base.clip={name} and start the server.")
    if not live.plain:
        raise ReleaseError(f"release {live.number} is on trial.", "Promote it or take it back first.")
    waiting = [each.id for each in ledger.pending_proposals() if each.family != "vlm"]
    if waiting:
        raise ReleaseError(f"proposal {waiting[0]} is not decided yet.", "Wait until it is released or has failed.")
    approved = ledger.approved_upgrade(base.digest)
    live_base = live.clip_base or (approved.old_base if approved else digest_of(settings.home, settings.base.clip))
    if live_base is None or live_base == base.digest:
        raise BaseModelError(f"release {live.number} has the base {name!r} already.", "See `ratchet releases list`.")
    if approved is not None:
        update = ledger.update(approved.update_id)
        if update.incumbent != live.clip:
            raise ReleaseError(
                f"{update.id} was judged against {update.incumbent or 'the base alone'}, and {live.clip or 'the base'} "
                "is live by now.",
                f"Drop it (`ratchet base upgrade {name} --cancel`) and upgrade again.",
            )
        return Switch(live, live_base, base, update.adapter, update.id)
    earlier = [row for row in ledger.newest_of_each_base() if row.clip_base == base.digest]
    if not earlier:
        raise ReleaseError(
            f"no upgrade to the base {name!r} has passed the gate, and it was never live.",
            f"Begin with `ratchet base upgrade {name}`.",
        )
    for adapter, why in ledger.withdrawn([earlier[0].clip]).items():
        raise ReleaseError(f"{adapter} was withdrawn: {why}", f"Upgrade again: `ratchet base upgrade {name}`.")
    return Switch(live, live_base, base, earlier[0].clip, None)


def switch_base(settings: Settings, name: str, *, actor: str, reason: str) -> ReleaseRow:
    """Load the base with its adapter here, check golden inputs as an encoder would, and release it. Raises
    AdapterError: it cannot be loaded, nothing was released; ReleaseConflict: something else was released meanwhile;
    BaseModelError, ReleaseError: see :func:`plan_switch`."""
    with closing(Ledger.open(settings.ledger)) as ledger:
        switch = plan_switch(settings, ledger, name)
        with step(f"loading base {name}"):
            engine = ClipEngine.of(settings, switch.base)
            if switch.clip is not None:
                engine.load(switch.clip, fetch_recorded(Artifacts(settings.artifacts), ledger, switch.clip))
            engine.golden(switch.clip)
        back = switch.update_id is None
        row = ledger.change_base(
            switch.live, clip=switch.clip, base=switch.base.digest, live_base=switch.live_base, rollback=back,
            actor=actor, reason=f"{reason} (base {name} {digest12(switch.base.digest)})", update_id=switch.update_id,
        )  # fmt: skip
        if back and settings.rollout.hold_after_rollback and ledger.held() is None:
            ledger.hold(actor, f"after the switch back to the base {name}: {reason}")
        return row
