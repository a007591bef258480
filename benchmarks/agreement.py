"""``ratchet bench agreement``: the guard's agreement for increasingly broken adapters, and how much they lost.

Random noise of growing size is added to the weights of the settings' bases. For each size: how often noisy model and
base agree about held-out items, and how well the noisy one still answers them (CLIP: recall of an image's text among
the five nearest; VLM: share of right answers). Named adapters are measured in the same way, against the base.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from benchmarks.command import show_table
from benchmarks.machine import machine
from core.artifacts import Artifacts
from core.errors import RatchetError
from core.progress import step
from core.settings import Settings
from ratchet_client.images import decode_image
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, question
from serving.engines.vlm.open import SyncVlm
from serving.engines.vlm.vlm_base import load_vlm_base
from serving.messages import Modality
from serving.releases.shadow_traffic import TEXTS, Neighbours, same_answer
from streams.publish.folders import FolderItem, read_folder
from tests.support.inputs import random_adapter

KINDS: tuple[tuple[int, Modality], ...] = ((0, "image"), (1, "text"))
SIZES = (0.02, 0.05, 0.1, 0.2, 0.3, 1.0, 10.0)
ITEMS = 80
ANSWER_TOKENS = 16
CLIP_DOMAINS, VLM_DOMAINS = ("noto", "pixel_ultica"), ("vqa_base",)
FigureRow = dict[str, Any]
Vectors = npt.NDArray[np.float32]


def run(
    settings: Settings, sizes: Sequence[float] = SIZES, adapters: Sequence[str] = (), domains: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure and return the figures. ``domains``: prepared folders in ``home/data``; some of the shipped ones by
    default.

    Raises RatchetError when a domain is not prepared.
    """
    rows: list[FigureRow] = []
    for domain in domains or (*CLIP_DOMAINS, *VLM_DOMAINS):
        folder = settings.home / "data" / domain
        if not folder.is_dir():
            raise RatchetError(f"{folder} is not there.", f"Run `ratchet demo data prepare {domain}`.")
        items = read_folder(folder, split="test")
        asked = [item for item in items if item.question]
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as made, step(f"measuring on {domain}"):
            if asked:
                rows += _vlm(settings, domain, _spread(asked), sizes, adapters, Path(made))
            else:
                rows += _clip(settings, domain, _spread([i for i in items if i.text]), sizes, adapters, Path(made))
    return {"rows": rows, "items": ITEMS, "machine": machine()}


def _spread(items: Sequence[FolderItem]) -> list[FolderItem]:
    return list(items[:: max(1, len(items) // ITEMS)][:ITEMS])


def _clip(
    settings: Settings, domain: str, items: Sequence[FolderItem], sizes: Sequence[float], adapters: Sequence[str],
    made: Path,
) -> Iterator[FigureRow]:  # fmt: skip
    base = load_base(settings.home, settings.base.clip)
    engine = ClipEngine(base)
    pixels = np.stack([base.preprocess.pixels(item.bytes()) for item in items])
    texts = [item.text for item in items]

    def encoded(name: str | None) -> tuple[Vectors, Vectors, Vectors]:
        return (
            engine.encode_images(pixels, name), engine.encode_texts(texts, name), engine.encode_texts(list(TEXTS), name)
        )  # fmt: skip

    before = encoded(None)
    yield {"family": "clip", "domain": domain, "adapter": "base", "agreement": 1.0, "right": _recall(*before[:2])}
    for label, name, folder in _candidates(settings, base, sizes, [a for a in adapters if a.startswith("clip")], made):
        engine.load(name, folder)
        after = encoded(name)
        engine.unload(name)
        neighbours = Neighbours()
        neighbours.fix(after[2], before[2])
        found = [
            neighbours.judge(kind, after[part][index], before[part][index])
            for index in range(len(items))
            for part, kind in KINDS
        ]
        judged = [agreed for agreed in found if agreed is not None]
        row = {"family": "clip", "domain": domain, "adapter": label, "agreement": sum(judged) / len(judged)}
        yield {**row, "right": _recall(*after[:2])}


def _recall(images: Vectors, texts: Vectors, nearest: int = 5) -> float:
    ranked = np.argsort(-(images @ texts.T), axis=1)[:, :nearest]
    return float((ranked == np.arange(len(images))[:, None]).any(axis=1).mean())


def _vlm(
    settings: Settings, domain: str, items: Sequence[FolderItem], sizes: Sequence[float], adapters: Sequence[str],
    made: Path,
) -> Iterator[FigureRow]:  # fmt: skip
    from serving.engines.vlm.hf_engine import TransformersEngine  # slow to import

    base = load_vlm_base(settings.home, settings.base.vlm)
    asks = [question(np.array(decode_image(i.bytes()).convert("RGB")), i.question, ANSWER_TOKENS) for i in items]
    with SyncVlm(TransformersEngine(base, settings.serve)) as vlm:
        before = vlm.replies(asks, None)
        old = [row[0] for row in vlm.scores(asks, [[reply.text or " "] for reply in before], None)]
        yield {"family": "vlm", "domain": domain, "adapter": "base", "agreement": 1.0, "right": _right(items, before)}
        for label, name, folder in _candidates(
            settings, base, sizes, [a for a in adapters if a.startswith("vlm")], made
        ):
            vlm.load(name, folder)
            after, new = _answers(vlm, asks, before, name)
            vlm.unload(name)
            judged = [
                same_answer(b.text, a.text, o, n, len(b.tokens))
                for b, a, o, n in zip(before, after, old, new, strict=True)
            ]
            row = {"family": "vlm", "domain": domain, "adapter": label, "agreement": sum(judged) / len(judged)}
            equal = sum(a.text.strip() == b.text.strip() for a, b in zip(after, before, strict=True)) / len(after)
            yield {**row, "right": _right(items, after), "equal": equal}


def _answers(
    vlm: SyncVlm, asks: Sequence[GenerationRequest], before: Sequence[GenerationResult], name: str
) -> tuple[list[GenerationResult], list[float]]:
    scores = vlm.scores(asks, [[reply.text or " "] for reply in before], name)
    return vlm.replies(asks, name), [row[0] for row in scores]


def _right(items: Sequence[FolderItem], replies: Sequence[GenerationResult]) -> float:
    pairs = zip(items, replies, strict=True)
    return sum(reply.text.strip().lower() == item.answer.strip().lower() for item, reply in pairs) / len(items)


def _candidates(
    settings: Settings, base: Any, sizes: Sequence[float], adapters: Sequence[str], made: Path
) -> Iterator[tuple[str, str, Path]]:
    for size in sizes:
        folder = made / str(size)
        yield f"noise {size:.0%}", random_adapter(base, folder, 3, scale=size), folder
    for name in adapters:
        yield name, name, Artifacts(settings.artifacts).fetch(f"adapters/{name}")


def show(figures: dict[str, Any]) -> None:
    table = Table("model", "domain", "adapter", "agrees", "right", title="Agreement with the base")
    for row in figures["rows"]:
        table.add_row(row["family"], row["domain"], row["adapter"], f"{row['agreement']:.0%}", f"{row['right']:.0%}")
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="ratchet bench agreement", description="What the guard sees.")
    parser.add_argument("--adapter", action="append", default=[], help="also this one of the ledger (repeatable)")
    parser.add_argument("--domain", action="append", default=[], help="prepared folder in home/data (repeatable)")
    parser.add_argument("--sizes", type=float, nargs="*", default=list(SIZES), help="of the noise, to the weights")
    options = parser.parse_args(arguments)
    show(run(settings, options.sizes, options.adapter, options.domain))
