"""One update of each kind for one model: ``python -m benchmarks.variety.updates MODEL LAKE KIND...``.

There is a process for each model, so that crashes and hangs are noticed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from core.errors import RatchetError
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from streams.store.conditions import quoted
from streams.store.sample_store import SampleStore
from tests.support.tiny import tiny_base
from tests.support.vlm_families import FAMILIES, write_family
from updater.bases.register import add_vlm
from updater.data.pools import Pair, Pools, Question
from updater.recipes import load_recipe
from updater.training.result import Limits
from updater.training.train import train

CLIP: Final = "CLIP"
MODELS: Final = (CLIP, *FAMILIES)
STEPS, BATCH, PICTURES = 3, 4, 12
PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "SmolVLM": {"do_image_splitting": True, "size": {"longest_edge": 128}},
    "InternVL": {"crop_to_patches": True, "min_patches": 1, "max_patches": 12},
    "Pixtral": {"size": {"longest_edge": 128}},
}
"""Settings of published processors, at the scale of the small towers: SmolVLM cuts a picture to four tiles a side
(2,048 of 512 pixels), InternVL to at most twelve, Pixtral keeps its shape. The other families need no change."""


def open_model(name: str, folder: Path) -> ClipBase | VlmBase:
    """A small random model. Raises RatchetError."""
    if name == CLIP:
        return tiny_base(folder)
    write_family(name, folder / "model")
    for file in (folder / "model").glob("*processor*.json"):
        values = json.loads(file.read_text())
        _publish(values, PUBLISHED.get(name, {}))
        file.write_text(json.dumps(values))
    return add_vlm(folder, "small", folder / "model")


def _publish(values: dict[str, Any], changes: dict[str, Any]) -> None:
    if changes and "size" in values and "image_processor_type" in values:
        values.update(changes)
    for each in values.values():
        if isinstance(each, dict):
            _publish(each, changes)


def update(base: ClipBase | VlmBase, store: SampleStore, kind: str, folder: Path) -> int:
    """Train on samples of a kind. Returns the steps. Raises any error that ends it."""
    columns = ["id", "image", "text", "question", "answer"]
    rows = store.select(f"kind = 'sample' AND split = 'train' AND domain = {quoted(kind)}", columns, 2 * PICTURES)
    known: list[Any] = []
    for row in rows:
        read = partial(bytes, row["image"])
        if isinstance(base, ClipBase):
            known.append(Pair(row["id"], row["text"], read))
        else:
            known.append(Question(row["id"], row["question"], row["answer"], read))
    recipe = load_recipe("naive" if isinstance(base, ClipBase) else "vlm-naive")
    result = train(
        base, recipe.model_copy(update={"max_steps": STEPS, "batch_size": BATCH}),
        Pools(tuple(known[::2]), tuple(known[1::2]), ()), None, seed=0,
        limits=Limits(gflops=1e9, seconds=300, threads=1, checkpoint_steps=STEPS), out_dir=folder / "adapters",
        work_dir=folder / "work", device="cpu",
    )  # fmt: skip
    return result.steps


def tried(name: str, lake: str, kinds: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    store = SampleStore(lake)
    try:
        base = open_model(name, folder)
    except Exception as error:
        yield {"kind": None, "problem": _words(error)}
        return
    for number, kind in enumerate(kinds):
        try:
            yield {"kind": kind, "steps": update(base, store, kind, folder / str(number))}
        except Exception as error:  # of transformers or PEFT: the finding of this benchmark
            yield {"kind": kind, "problem": _words(error)}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(error.message if isinstance(error, RatchetError) else str(error))[:300]}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ratchet-variety-") as place:
        for found in tried(sys.argv[1], sys.argv[2], sys.argv[3:], Path(place)):
            print(json.dumps(found), flush=True)
