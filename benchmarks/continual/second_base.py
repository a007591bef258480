"""A second base of another architecture, trained here: a small ViT and a text transformer, as in CLIP.

Both are distilled from the shipped base, whose convolutional tower and MiniLM they replace, on the domains that it was
trained on and on additional texts, so that the text tower knows more words than the captions have.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from core.progress import progress_log, track
from core.settings.serving import SHIPPED
from demo.clip.shipped import DOMAINS
from demo.clip.towers import load_pixels
from demo.data import prepare_domain
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, construct, list_bases, load_base, save_base
from serving.engines.preprocess import Preprocess
from serving.engines.tokens import make_tokenizer
from streams.publish.folders import FolderItem, read_folder
from updater.data.pools import caption_number
from updater.methods.optimizers import learning_rate
from updater.recipes import Schedule

NAME = "vit"
SIDE, PATCH, WIDTH, HEAD_WIDTH, LAYERS, CONTEXT = 96, 16, 192, 48, 6, 48
PAGE = 1024
"""Texts that are encoded between two progress reports; the engine sorts them by length."""
TOKENIZER: dict[str, Any] = {"kind": "simple", "kwargs": {}}
PREPROCESS = Preprocess(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Distillation:
    """Hyperparameters. With two cores an epoch of the defaults takes two minutes."""

    epochs: int = 10
    batch: int = 64
    rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    follow: float = 8.0
    """Weight of 1 - cosine to the teacher's features, added to the contrastive loss."""
    seed: int = 0


def second_base(home: Path, how: Distillation | None = None) -> ClipBase:
    """The base ``vit`` in ``home``, trained if missing. Raises PackageError when data cannot be obtained."""
    if NAME in list_bases(home, "clip"):
        return load_base(home, NAME)
    items = [item for name in DOMAINS for item in read_folder(prepare_domain(name, home), "train") if item.text]
    words = sorted({tag for item in items for tag in item.tags if len(tag) > 2} | set(_imagenet_names()))
    return distilled(home, load_base(home, SHIPPED), items, words, how or Distillation())


def distilled(
    home: Path, teacher: ClipBase, items: Sequence[FolderItem], words: Sequence[str], how: Distillation
) -> ClipBase:
    """Train it on pairs and, for the text tower only, on additional words; register it as ``vit``."""
    engine = ClipEngine(teacher, "cpu")
    texts = sorted({item.text for item in items} | set(words))
    place = {text: number for number, text in enumerate(texts)}
    pages = [texts[start : start + PAGE] for start in range(0, len(texts), PAGE)]
    known = torch.from_numpy(
        np.concatenate([engine.encode_texts(page) for page in track(pages, "the teacher's texts")])
    )
    seen = torch.from_numpy(
        np.concatenate([engine.encode_images(batch) for batch in load_pixels(items, teacher.preprocess, 8)])
    )
    pixels = np.concatenate(list(load_pixels(items, PREPROCESS)))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(how.seed)
        config = _config(teacher.dim)
        model = construct(config, Path(folder)).train()
        tokenize = make_tokenizer(TOKENIZER, Path(folder), CONTEXT)
        own = torch.tensor([place[item.text] for item in items])
        captions = torch.tensor([caption_number(item.text) for item in items])
        tokens = tokenize(texts)
        _train(model, pixels, tokens, own, captions, seen, known, how)
        about = {"architecture": "ViT and text transformer, as CLIP's", "distilled from": teacher.name}
        return save_base(home, NAME, model.eval(), config, PREPROCESS, TOKENIZER, about=about, replace=True)


def _train(
    model: nn.Module, pixels: np.ndarray, tokens: Tensor, own: Tensor, captions: Tensor, seen: Tensor, known: Tensor,
    how: Distillation,
) -> None:  # fmt: skip
    clip = cast(Any, model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.rate)
    draw = torch.Generator().manual_seed(how.seed)
    batches = [
        rows
        for _ in range(how.epochs)
        for order in [torch.randperm(len(pixels), generator=draw)]
        for rows in (order[a:b] for a, b in pairwise([*range(0, len(order), how.batch), len(order)]))
    ]
    schedule = Schedule(
        kind="cosine", peak=how.rate, final=how.rate / 1000, warmup_steps=min(how.warmup, len(batches) // 4)
    )
    losses = []
    for step, rows in enumerate(track(batches, "training the second base")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, len(batches), first=True)
        further = torch.randint(len(tokens), (len(rows),), generator=draw)
        image = F.normalize(clip.encode_image(PREPROCESS.normalise(pixels[rows.numpy()])), dim=-1)
        both = F.normalize(clip.encode_text(torch.cat([tokens[own[rows]], tokens[further]])), dim=-1)
        text = both[: len(rows)]
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        target = (captions[rows][:, None] == captions[rows][None, :]).float()
        target = target / target.sum(dim=1, keepdim=True)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        taught = torch.cat([known[own[rows]], known[further]])
        away = (1 - (image * seen[rows]).sum(dim=1)).mean() + (1 - (both * taught).sum(dim=1)).mean()
        loss = contrast + how.follow * away
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    few = max(1, len(losses) // 20)
    progress_log.info(f"loss {np.mean(losses[:few]):.2f} -> {np.mean(losses[-few:]):.2f}")


def _config(dim: int) -> dict[str, Any]:
    return {
        "embed_dim": dim,
        "vision_cfg": {
            "image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": WIDTH // HEAD_WIDTH,
            "layers": LAYERS - 2,
        },
    }  # fmt: skip


def _imagenet_names() -> list[str]:
    info = ImageNetInfo()
    return [info.index_to_description(number, detailed=False).split(", ")[0] for number in range(1000)]
