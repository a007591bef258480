"""First stage: the vision tower learns features of EfficientNet-Lite0 before any question is asked.

The teacher (ImageNet weights, as in the shipped CLIP's image tower) sees 128 px, the student 64 px of the same view. At
128 px the teacher's last map has 4 x 4 places, like the 16 image tokens, and a middle one 8 x 8, like the patches, so
every place has its own target. The tower also classifies the concept of pictures with several drawings of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from core.progress import progress_log, track
from demo.clip import towers
from demo.data import prepare_domain
from demo.vlm.model import JOINED, VISION
from demo.vlm.pictures import read_pictures, recolour, seen, shade, warp
from demo.vlm.recipe import Optimizer, VlmRecipe, half_precision
from streams.publish.folders import FolderItem, read_folder

DOMAINS = ("game_icons", "pixel_mshock", "pixel_retro")
"""Further pictures for the tower without questions: their train splits."""
LAST, MIDDLE = 192, 48
_TEACHER_BATCH = 64
_CONCEPT_WEIGHT = 0.15


@dataclass(frozen=True)
class Views:
    """Pictures as the student sees them, and the teacher's maps: [n] views."""

    pixels: torch.Tensor
    """``uint8 [n, 3, 64, 64]``."""
    last: torch.Tensor
    """``float16 [n, 16, LAST]``."""
    middle: torch.Tensor
    """``float16 [n, 64, MIDDLE]``."""
    concept: torch.Tensor
    """``int64 [n]``; -1 for a concept with one drawing."""


def tower_items(home: Path, questions: Sequence[FolderItem]) -> list[FolderItem]:
    """One row per picture: those with training questions, and the train splits of `DOMAINS`."""
    by_path = {item.path: item for item in questions}
    more = [item for domain in DOMAINS for item in read_folder(prepare_domain(domain, home), "train")]
    return [*by_path.values(), *more]


def warm_up(model: Any, items: Sequence[FolderItem], how: VlmRecipe) -> float:
    """Train the vision tower on views of `items`; returns the mean loss of the last tenth of the steps."""
    views = _views(items, how)
    vision = model.model.vision_model
    width, joined = VISION["hidden_size"], VISION["hidden_size"] * JOINED**2
    concepts = int(views.concept.max()) + 1
    heads = nn.ModuleDict({
        "last": nn.Linear(joined, LAST), "middle": nn.Linear(width, MIDDLE), "concept": nn.Linear(joined, concepts)
    })  # fmt: skip
    optimizer = Optimizer([(vision, 1.0), (heads, 1.0)], how, how.tower_steps)
    generator = torch.Generator().manual_seed(how.seed + 2)
    vision.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.int64)
    for _ in track(range(how.tower_steps), "training the vision tower", total=how.tower_steps):
        if len(order) < how.tower_batch:
            order = torch.cat([order, torch.randperm(len(views.pixels), generator=generator)])
        rows, order = order[: how.tower_batch], order[how.tower_batch :]
        pixels = views.pixels[rows].float() / 127.5 - 1
        with half_precision():
            patches = vision(pixel_values=pixels).last_hidden_state
            tokens = model.model.connector.pixel_shuffle(patches, JOINED)
            last, middle = heads["last"](tokens).float(), heads["middle"](patches).float()
            named = heads["concept"](tokens.mean(dim=1)).float()
        loss = functional.mse_loss(last, views.last[rows].float())
        loss = loss + 0.5 * functional.mse_loss(middle, views.middle[rows].float())
        known = views.concept[rows]
        loss = loss + _CONCEPT_WEIGHT * functional.cross_entropy(named, known, ignore_index=-1)
        optimizer.step(loss)
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            progress_log.info(f"tower step {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _views(items: Sequence[FolderItem], how: VlmRecipe) -> Views:
    images = read_pictures([item.path for item in items], "reading pictures")
    counts = Counter(item.concept for item in items)
    several = sorted(concept for concept, count in counts.items() if concept and count > 1)
    number = {concept: i for i, concept in enumerate(several)}
    concept = torch.tensor([number.get(item.concept, -1) for item in items])
    generator = torch.Generator().manual_seed(how.seed + 1)
    teacher = _Teacher()
    pixels, last, middle = [], [], []
    starts = [(view, start) for view in range(how.views) for start in range(0, len(images), _TEACHER_BATCH)]
    for _, start in track(starts, "asking the teacher"):
        shown = shade(recolour(warp(images[start : start + _TEACHER_BATCH], generator), generator), generator)
        pixels.append(((seen(shown) + 1) * 127.5).round().to(torch.uint8))
        far, near = teacher.maps(shown)
        last.append(far)
        middle.append(near)
    return Views(torch.cat(pixels), torch.cat(last), torch.cat(middle), concept.repeat(how.views))


class _Teacher:
    """EfficientNet-Lite0 with principal components of its maps, computed from its first batch."""

    def __init__(self) -> None:
        self.net: Any = timm.create_model(towers.TRUNK, pretrained=False, num_classes=0)
        self.net.load_state_dict({k: v for k, v in towers.image_state().items() if not k.startswith("classifier.")})
        self.net.eval().to(memory_format=torch.channels_last)
        self.components: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.inference_mode()
    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``float16 [n, 16, LAST]`` and ``[n, 64, MIDDLE]`` of images in 0..1, with components of similar variance."""
        x = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        with half_precision():
            x = self.net.bn1(self.net.conv_stem(x))
            for block in self.net.blocks[:5]:
                x = block(x)
            middle = x
            for block in self.net.blocks[5:]:
                x = block(x)
            x = self.net.bn2(self.net.conv_head(x))
        return self._components("last", x.float(), LAST), self._components("middle", middle.float(), MIDDLE)

    def _components(self, name: str, maps: torch.Tensor, count: int) -> torch.Tensor:
        places = maps.flatten(2).transpose(1, 2)
        if name not in self.components:
            flat = places.flatten(0, 1)
            mean = flat.mean(dim=0)
            values, vectors = torch.linalg.eigh(torch.cov((flat - mean).T))
            values, vectors = values[-count:].clamp(min=1e-6), vectors[:, -count:]
            # Fourth-root scaling: the first components matter more, the last still count.
            self.components[name] = mean, vectors * (values[-1] ** -0.25) * values**-0.25
        mean, project = self.components[name]
        return ((places - mean) @ project).to(torch.float16)
