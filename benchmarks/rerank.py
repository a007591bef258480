"""``ratchet bench rerank``: what the VLM makes of CLIP's nearest pictures, and how long it takes.

For held-out texts of folder datasets, CLIP finds the nearest of their pictures, and the VLM orders these by its
probability of yes, as ``/v1/search`` does with ``rerank``. Reports the share of texts whose own picture comes first,
without and with it, and the seconds that a text's pairs take, one text at a time. Calls the models without a server.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks.bench_home import cache_folder
from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from benchmarks.random_vlm import RERANKER, random_reranker
from core.progress import step
from core.settings import Settings
from ratchet_client.images import decode_image
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.engines.vlm.generation import CHOICES
from serving.engines.vlm.open import SyncVlm, open_engine
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.http.rerank import judged
from serving.http.vqa import normalised
from streams.publish.folders import FolderItem, read_folder

DOMAINS: Final = ("fluent3d", "openclipart", "stamp_photo")
TEXTS: Final = 60
K: Final = 20
CANDIDATES: Final = 300
SEED: Final = 7


def run(
    settings: Settings, domains: Sequence[str] = DOMAINS, texts: int = TEXTS, k: int = K, vlm_name: str = ""
) -> dict[str, Any]:
    """Measure and return the figures by domain. ``vlm_name``: a registered base, or :data:`RERANKER`; empty: the
    settings'."""
    clip = ClipEngine(load_base(settings.home, settings.base.clip), threads=1)
    name = vlm_name or settings.base.vlm
    base = random_reranker(cache_folder(settings)) if name == RERANKER else load_vlm_base(settings.home, name)
    with step(f"loading the VLM {base.name}"), SyncVlm(open_engine(base, settings.serve)) as vlm:
        rows = {name: _domain(settings, name, clip, vlm, texts, k) for name in domains}
        return {"vlm": base.name, "k": k, "engine": vlm.engine.kind, "domains": rows, "machine": machine()}


def _domain(settings: Settings, name: str, clip: ClipEngine, vlm: SyncVlm, texts: int, k: int) -> dict[str, Any]:
    items: list[FolderItem] = list(read_folder(settings.home / "data" / name, "test"))[:CANDIDATES]
    images = [decode_image(item.path.read_bytes()) for item in items]
    vectors = clip.encode_images(np.stack([clip.base.preprocess.pixels(image) for image in images]))
    chosen = np.random.default_rng(SEED).choice(len(items), min(texts, len(items)), replace=False)
    scores = clip.encode_texts([items[place].text for place in chosen]) @ vectors.T
    before, after, among, seconds = [], [], [], []
    for place, row in zip(chosen, scores, strict=True):
        wanted = items[place].text
        nearest = np.argsort(-row, kind="stable")[:k]
        found = [items[each].text == wanted for each in nearest]
        began = time.perf_counter()
        asks = [judged((wanted, ("", b"")), (np.asarray(images[each], np.uint8),)) for each in nearest]
        shares = [normalised(pair)[0] for pair in vlm.scores(asks, [CHOICES] * len(asks), None)]
        seconds.append(time.perf_counter() - began)
        before.append(found[0])
        after.append(found[int(np.argmax(shares))])
        among.append(any(found))
    return {
        "pictures": len(items), "texts": len(chosen), "r1": _mean(before), "r1_reranked": _mean(after),
        "recall_at_k": _mean(among), "better": sum(a > b for a, b in zip(after, before, strict=True)),
        "worse": sum(a < b for a, b in zip(after, before, strict=True)),
        "p50": round(float(np.median(seconds)), 3), "p95": round(float(np.quantile(seconds, 0.95)), 3),
    }  # fmt: skip


def _mean(values: Sequence[bool]) -> float:
    return round(float(np.mean(values)), 3)


def show(figures: dict[str, Any]) -> None:
    table = Table(
        "domain", "R@1", f"R@1, best of {figures['k']} by the VLM", "in reach", "better, worse", "p50, p95 (s)"
    )
    for name, row in figures["domains"].items():
        change, took = f"{row['better']}, {row['worse']}", f"{row['p50']}, {row['p95']}"
        table.add_row(name, str(row["r1"]), str(row["r1_reranked"]), str(row["recall_at_k"]), change, took)
    show_table(table, figures, f"{figures['vlm']} on {figures['engine']}, {figures['machine']}")


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("rerank", __doc__)
    parser.add_argument("--domains", nargs="+", default=DOMAINS, help="prepared folders in home/data")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts of each domain ({TEXTS})")
    parser.add_argument("--k", type=int, default=K, help=f"pictures that the VLM sees for a text ({K})")
    about = f"a registered VLM, or {RERANKER}: its shape with random weights, of which only the seconds count"
    parser.add_argument("--vlm", default="", help=f"{about}; default: base.vlm")
    options = parser.parse_args(arguments)
    show(run(settings, options.domains, options.texts, options.k, options.vlm))
