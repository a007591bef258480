"""The pools of an update, as it trains on them."""

from __future__ import annotations

from core.ledger import BaseUpgradeRow, UpdateRow
from core.settings import Settings
from streams.store.sample_store import SampleStore
from updater.bases import reference_of
from updater.data.draw import left_out
from updater.data.pools import Pools, draw_pools
from updater.recipes import Recipe


def pools_of(
    settings: Settings, store: SampleStore, update: UpdateRow, recipe: Recipe, upgrade: BaseUpgradeRow | None = None
) -> Pools:
    """A pure function of the store's version that the update is pinned to, and of the settings."""
    return draw_pools(
        store,
        recipe,
        reference_of(settings, recipe.family),
        update.store_version,
        update.data_from,
        update.seed,
        settings.updater.draw,
        update.data_to if upgrade else None,
        settings.trust,
        left_out(update),
    )
