"""What an upgrade to another base would come to: shown before it begins."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from core.digests import digest12
from core.settings import Settings
from serving.engines.clip_base import ClipBase
from streams.store import SampleStore
from updater.training.result import Estimate, Limits
from updater.training.train import estimate
from updater.upgrades.replay import Replay


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
