"""Screens new samples before an update learns from them: what agrees less than its kind under the base, and under the
live adapter, is held in the store until an operator accepts it. Sources of `gate.trusted_sources` are not screened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core import metrics
from core.artifacts import Artifacts
from core.errors import GateError
from core.ledger import Ledger
from core.progress import progress_log
from core.recorded_adapters import fetch_recorded
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from streams.records.signatures import AUDIT
from streams.store.rows import chunks
from streams.store.sample_store import ADDRESS, SampleStore
from streams.store.writer import StoreWriter
from updater.data.agreement import Agreements, Kind
from updater.gate.score import Scorer
from updater.gate.suite_items import Item, sample_item
from updater.gate.trust import ANY

AT_ONCE: Final = 64
BASE: Final = "base"
REASON: Final = "held_agreement"
Agreed = dict[str, NDArray[np.float64]]
"""Cosine similarities [n] of samples by model, NaN for those that cannot be read."""


def screen(
    settings: Settings,
    ledger: Ledger,
    artifacts: Artifacts,
    store: SampleStore,
    base: ClipBase,
    incumbent: str | None,
    *,
    stop: Callable[[], None] = lambda: None,
) -> int:
    """Screen the samples that were stored since the last call, of both sides of the split. Returns how many are held
    now. A call that dies is repeated. ``stop``: called between batches; raises to end. Raises StoreError, LedgerError,
    AdapterError."""
    ranges, trusted = settings.trust.hold_below, {AUDIT, *settings.gate.trusted_sources}
    if not ranges:
        return 0
    known = ledger.screening("clip")
    version, offsets = store.version(), {} if known is None else dict(known.offsets)
    ids, kinds, addresses = _new(store, version, offsets)
    if not ids:
        return 0
    engine = ClipEngine.of(settings, base, threads=settings.updater.threads)
    models = {f"{BASE} {base.digest}": None, **({incumbent: incumbent} if incumbent else {})}
    if incumbent:
        engine.load(incumbent, fetch_recorded(artifacts, ledger, incumbent))
    progress_log.info(f"screening {len(ids):,} new samples")
    agreed = _agreed(engine, store, version, addresses, models, stop)
    counts = {} if known is None else known.counts
    tables = {model: Agreements.parse(counts.get(model, ())) for model in models}
    low = np.array([not trusted & {source, ANY} for source, _ in kinds])
    fences = {}
    for model, table in tables.items():
        values, good = agreed[model], np.isfinite(agreed[model])
        table.add([kind for kind, fine in zip(kinds, good, strict=True) if fine], values[good])
        fences[model] = table.fences(set(kinds), ranges)
        bounds = np.array([fences[model][kind] for kind in kinds])
        # A model that does not know a kind yet does not speak for it.
        low &= good & ((values < bounds) | ((bounds == -1.0) & (model == incumbent)))
    first = next(iter(models))

    def why(number: int) -> str:
        kind = kinds[number]
        usual = f"at least {fences[first][kind]:.3f} is usual of {' in '.join(filter(None, kind))}"
        return f"image and text agree by {agreed[first][number]:.3f}, {usual}"

    held = {ids[number]: (REASON, why(number)) for number in np.flatnonzero(low)}
    count = StoreWriter(store.table).hold(held) if held else 0
    ledger.screened("clip", store.offsets(version), {model: table.to_json() for model, table in tables.items()})
    if held:
        by_source = Counter(kinds[number][0] or "no source" for number in np.flatnonzero(low))
        worst = ", ".join(f"{number} of {source}" for source, number in by_source.most_common(3))
        progress_log.info(f"{count:,} samples are held for their agreement: {worst}; see `ratchet trust samples`")
    metrics.update.held(count)
    return count


def _new(store: SampleStore, version: int, offsets: dict[str, int]) -> tuple[list[str], list[Kind], list[int]]:
    ids: list[str] = []
    kinds: list[Kind] = []
    addresses: list[int] = []
    for split in ("train", "fresh_eval"):
        for batch in store.addresses(["id", "source", "domain", "until"], version, split, "text", offsets):
            batch = batch.filter(batch["until"].is_null())  # others have been accepted
            ids += batch["id"].to_pylist()
            rows = zip(batch["source"].to_pylist(), batch["domain"].to_pylist(), strict=True)
            kinds += [(source or "", domain or "") for source, domain in rows]
            addresses += batch[ADDRESS].to_pylist()
    return ids, kinds, addresses


def _agreed(
    engine: ClipEngine,
    store: SampleStore,
    version: int,
    addresses: Sequence[int],
    models: dict[str, str | None],
    stop: Callable[[], None],
) -> Agreed:
    found: dict[str, list[float]] = {model: [] for model in models}
    for some in chunks(addresses, AT_ONCE):
        stop()
        scorer = Scorer(engine)
        rows = store.rows_at(some, ["id", "text", "image"], version)
        images = {str(row["id"]): bytes(row["image"]) for row in rows}
        items = [sample_item(row, images.__getitem__, row["text"]) for row in rows]
        readable = [item for item in items if _reads(scorer, item)]
        names = [item.text for item in readable]
        for model, adapter in models.items():
            values = dict.fromkeys((item.id for item in items), float("nan"))
            if readable:
                pairs = scorer.images(readable, adapter) * scorer.texts(names, adapter)
                values |= zip((item.id for item in readable), pairs.sum(axis=1).tolist(), strict=True)
            found[model] += [values[item.id] for item in items]
    return {model: np.array(values) for model, values in found.items()}


def _reads(scorer: Scorer, item: Item) -> bool:
    try:
        scorer.pixels(item)
    except GateError:  # an update leaves it out as well
        return False
    return True
