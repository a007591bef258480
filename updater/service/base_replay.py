"""An upgrade to another CLIP base as an update: its data begin at nothing, and end where the live adapter's do.

The updater trains, judges and stores it as its own; what it passes is not proposed, because the encoders that run have
the old base: `ratchet base switch` releases it. Its adapter starts at zero on the new base. Nothing is distilled from
the old model. What it would cost is measured before it begins, on one batch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.digests import digest12, digest_json
from core.errors import BaseModelError, ConfigError, TrainingError
from core.ledger import BaseUpgradeRow, Ledger, UpdateRow
from core.settings import Settings
from serving.engines.clip_base import ClipBase, list_bases, load_base, need_base, shown
from streams.store.sample_store import SampleStore
from updater.data.draw import HAVING
from updater.data.mixture import plan_batches
from updater.data.pools import Pools, draw_pools, mixed_seed
from updater.families import family_recipe, reference_of
from updater.recipes import Recipe
from updater.service import triggers
from updater.step.learner import Base
from updater.training.result import Estimate, Limits
from updater.training.train import estimate

SUFFIX = ".upgrade"
"""Of the recipe's name: what an ordinary update of the recipe has tried does not depend on it."""


@dataclass(frozen=True)
class Replay:
    """What an upgrade would train."""

    old: ClipBase
    new: ClipBase
    recipe: Recipe
    incumbent: str | None
    """The live adapter, of the old base; None where nothing was released."""
    store_version: int
    data_to: Mapping[str, int]
    samples: int
    """Of the training split, before ``data_to``."""
    seed: int
    gflops: float
    """Budget, in MAF-GFLOPs."""

    def pools(self, settings: Settings, store: SampleStore) -> Pools:
        """What it learns from: no replay, since nothing was learned on the new base."""
        return draw_pools(
            store, self.recipe, reference_of(settings, "clip"), self.store_version, {}, self.seed,
            settings.updater.draw, self.data_to,
        )  # fmt: skip


def plan_replay(
    settings: Settings, ledger: Ledger, store: SampleStore, name: str, gflops: float | None = None
) -> Replay:
    """What an upgrade from the live base to the registered base ``name`` would train.

    Data are what the live adapter has learned; where that is nothing, all that is in the store. The recipe is the one
    of the settings, with steps enough to visit each sample once.

    Args:
        gflops: budget; by default that of a day.

    Raises:
        BaseModelError: there is no such base, or it is the live one.
        TrainingError: the live release has another base than the settings, an upgrade waits, or there is no sample.
    """
    if gflops is not None and not (math.isfinite(gflops) and gflops > 0):
        raise ConfigError(f"--budget {gflops} is no budget.", "Give MAF-GFLOPs above 0, e.g. --budget 200000.")
    old, new = load_base(settings.home, settings.base.clip), _registered(settings, name)
    if new.digest == old.digest:
        raise BaseModelError(f"base {name!r} is the one that is live ({digest12(old.digest)}).", "Name another one.")
    if waiting := waits_for_base(ledger, settings.home, old):
        raise TrainingError(f"{waiting}.", "Then upgrade.")
    incumbent = triggers.incumbent_of(ledger, "clip")
    version = store.version()
    learned = triggers.learned(ledger.updates(triggers.HISTORY, "clip"), incumbent) or store.offsets(version)
    everything, pending = (
        store.count(version=version, split="train", after=after, having=HAVING["clip"]) for after in ({}, learned)
    )
    samples = everything - pending
    if samples < 1:
        raise TrainingError(
            "the store has no training sample with a text that could be learned anew.",
            f"With nothing learned there is nothing to replay: set base.clip={name} and start with a new home.",
        )
    recipe = family_recipe(settings, "clip")
    sizes = {"new": samples, "reference": int(recipe.mixture.reference > 0), "replay": 0}
    new_rows = plan_batches(recipe.mixture, recipe.batch_size, sizes, 0).counts["new"]  # type: ignore[arg-type]
    longer = recipe.model_copy(
        update={
            "name": recipe.name[: 64 - len(SUFFIX)] + SUFFIX,
            "max_steps": max(recipe.max_steps, math.ceil(samples / new_rows)),
        }
    )
    return Replay(
        old=old, new=new, recipe=longer, incumbent=incumbent, store_version=version, data_to=learned, samples=samples,
        seed=mixed_seed(settings.updater.seed, version), gflops=gflops or settings.budget.gflops_per_day,
    )  # fmt: skip


def begin(ledger: Ledger, store: SampleStore, replay: Replay, actor: str) -> UpdateRow:
    """Record the upgrade; the updater of this home takes it as its next update."""
    values = replay.recipe.model_dump(mode="json")
    newest = ledger.updates(1)
    what = [
        replay.old.digest, replay.new.digest, values, replay.seed, replay.store_version, replay.data_to,
        replay.incumbent, replay.gflops, newest[0].id if newest else None,
    ]  # fmt: skip
    update = ledger.begin_base_upgrade(
        f"upgrade-{digest12(digest_json(what))}",
        recipe=values,
        seed=replay.seed,
        store_version=replay.store_version,
        data_to=dict(replay.data_to),
        incumbent=replay.incumbent,
        old=(replay.old.digest, replay.old.name),
        new=(replay.new.digest, replay.new.name),
        gflops=replay.gflops,
        actor=actor,
    )
    store.pin(update.id, update.store_version)
    return update


def unfinished(ledger: Ledger, name: str) -> UpdateRow | None:
    """An upgrade that was begun and not taken to its end. Raises TrainingError when it is to another base."""
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


def cancel(ledger: Ledger, store: SampleStore, name: str) -> UpdateRow:
    """Drop the upgrade to a base, whether it is trained yet or waits for its release. Raises TrainingError."""
    update = unfinished(ledger, name)
    if update is None:
        approved = ledger.approved_upgrade()
        if approved is None or approved.new_name != name:
            raise TrainingError(f"no upgrade to the base {name!r} is under way.", "See `ratchet status`.")
        update = ledger.update(approved.update_id)
    store.unpin(update.id)
    return ledger.advance_update(update.id, "abandoned", error="the upgrade was cancelled")


def new_base(settings: Settings, upgrade: BaseUpgradeRow) -> ClipBase:
    """What an upgrade goes to. Raises BaseModelError when it is not registered any more."""
    return need_base(settings.home, upgrade.new_base, upgrade.new_name)


def old_base(settings: Settings, upgrade: BaseUpgradeRow) -> ClipBase:
    """What an upgrade comes from. Raises BaseModelError when it is not registered any more."""
    return need_base(settings.home, upgrade.old_base, upgrade.old_name)


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


def waits_for_base(ledger: Ledger, home: Path, base: Base) -> str | None:
    """Why nothing is trained on a base now: the live release has another one, or an upgrade waits to be released."""
    if not isinstance(base, ClipBase):
        return None
    stable = ledger.stable()
    if stable is not None and stable.clip_base not in (None, base.digest):
        return (
            f"release {stable.number} has the base {shown(home, str(stable.clip_base))}, and this updater has "
            f"{base.name!r} ({digest12(base.digest)}): set base.clip to the live one and start again"
        )
    approved = ledger.approved_upgrade()
    if approved is not None and approved.old_base == base.digest:
        return (
            f"{approved.update_id} to the base {approved.new_name!r} passed the gate: `ratchet base switch "
            f"{approved.new_name}` releases it, `ratchet base upgrade {approved.new_name} --cancel` drops it"
        )
    return None


@dataclass(frozen=True)
class Plan:
    """A replay with what it would cost."""

    replay: Replay
    training: Estimate
    embedded: int
    """Samples of the store that the catalog embeds again in the new image space."""

    def rows(self) -> list[tuple[str, str]]:
        """For people: what, and how much."""
        replay, training = self.replay, self.training
        return [
            *differences(replay.old, replay.new),
            ("incumbent", replay.incumbent or f"{replay.old.name} alone"),
            ("recipe", replay.recipe.name),
            ("to learn anew", f"{replay.samples:,} samples"),
            (
                "visited within the budget",
                f"{min(training.visited, replay.samples):,} samples, {training.steps:,} steps",
            ),
            ("budget", f"{training.gflops:,.0f} of {replay.gflops:,.0f} MAF-GFLOPs"),
            ("time of training", f"about {training.seconds / 60:,.0f} minutes here, at full duty"),
            ("to embed after the switch", f"{self.embedded:,} samples, {self._catalog_gflops:,.0f} GFLOPs"),
        ]

    @property
    def _catalog_gflops(self) -> float:
        return self.embedded * self.training.sample_gflops


def plan_of(settings: Settings, store: SampleStore, replay: Replay) -> Plan:
    """Measure one batch on the new base; takes about as long as one step. Nothing is kept.

    Raises:
        BudgetError: the budget does not pay for one step.
        ConfigError, BaseModelError, StoreError.
    """
    limits = Limits(
        gflops=replay.gflops, seconds=math.inf, threads=settings.updater.threads,
        work_bytes=settings.updater.work_gib * 2**30,
    )  # fmt: skip
    pools = replay.pools(settings, store)
    with tempfile.TemporaryDirectory(prefix="ratchet-plan-") as folder:
        training = estimate(replay.new, replay.recipe, pools, seed=replay.seed, limits=limits, work_dir=Path(folder))
    return Plan(replay, training, store.count(version=replay.store_version))


def differences(old: ClipBase, new: ClipBase) -> list[tuple[str, str]]:
    """What distinguishes two bases, as rows for people; what is the same is left out."""
    facts = {
        "base": (f"{old.name} ({digest12(old.digest)})", f"{new.name} ({digest12(new.digest)})"),
        "dimension": (old.dim, new.dim),
        "image size": (f"{old.preprocess.size} px", f"{new.preprocess.size} px"),
        "text length": (f"{old.context_length} tokens", f"{new.context_length} tokens"),
        "tokenizer": (digest12(old.tokenizer_digest), digest12(new.tokenizer_digest)),
        "weights": (f"{old.weights_bytes / 1e6:,.1f} MB", f"{new.weights_bytes / 1e6:,.1f} MB"),
    }
    return [(what, f"{before} -> {after}") for what, (before, after) in facts.items() if before != after]
