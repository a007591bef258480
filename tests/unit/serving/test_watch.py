"""What is measured on a catalog, on real LanceDB: fragments and drift of the live space."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import REGISTRY

from core.settings.watching import Watch
from serving.catalog.catalog import Catalog
from serving.catalog.tables import Tables
from serving.catalog.watch import Watcher
from streams.store.sample_store import SampleStore
from tests.unit.serving.test_catalog import HERE, THERE, Encoder, pixels, put, rows, settle

SMALL = Watch(drift_window=16, drift_reference=40)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels)


@pytest.fixture
def catalog(tmp_path: Path, store: SampleStore) -> Iterator[Catalog]:
    yield Catalog(Tables(str(tmp_path / "catalog")), store, pixels, Encoder())


async def test_fragments_of_the_live_space_are_counted(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 40), 40)
    await catalog.adopt([HERE])
    await settle(catalog)
    await Watcher(catalog, SMALL).measure()
    assert value("catalog_fragments") == catalog.tables.fragments(HERE.image_space) > 0


async def test_samples_of_another_kind_are_drift_and_after_a_while_are_not(
    catalog: Catalog, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def encode(batch: np.ndarray, clip: str | None) -> np.ndarray:
        seeds = batch[:, 0, 0, 0].astype(int)
        made = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds]).astype(np.float32)
        made[(seeds >= 100) & (seeds < 180), 0] += 3.0  # samples 100 to 179 are of another domain
        return made

    monkeypatch.setattr(catalog.reconciler.embedder, "encode", encode)
    await catalog.adopt([HERE])
    watcher, shifts = Watcher(catalog, SMALL), []
    for start, count in ((0, 60), (60, 40), (100, 16), (116, 60)):
        put(store, rows(start, count), start + count)
        await settle(catalog)
        await watcher.measure()
        shifts.append(value("drift_mean_shift", space="image") or 0.0)
    calm, still_calm, drifted, settled = shifts
    assert 2 * max(calm, still_calm, settled) < drifted


async def test_windows_are_read_anew_in_the_space_that_is_live(catalog: Catalog, store: SampleStore) -> None:
    put(store, rows(0, 60), 60)
    await catalog.adopt([HERE])
    await settle(catalog)
    watcher = Watcher(catalog, SMALL)
    await watcher.measure()
    before = value("drift_frechet_distance", space="image")
    await watcher.measure()
    assert value("drift_frechet_distance", space="image") == before  # nothing new, nothing measured
    await catalog.adopt([THERE, HERE])
    await settle(catalog)
    await watcher.measure()
    assert value("drift_frechet_distance", space="image") != before


async def test_few_samples_are_not_called_drift(catalog: Catalog, store: SampleStore) -> None:
    before = value("drift_mean_shift", space="image")
    put(store, rows(0, 20), 20)
    await catalog.adopt([HERE])
    await settle(catalog)
    await Watcher(catalog, SMALL).measure()
    assert value("drift_mean_shift", space="image") == before
