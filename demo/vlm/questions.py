"""Second stage: connector and language model learn to answer, and the vision tower learns on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from core.progress import progress_log, track
from demo.vlm.model import SIDE
from demo.vlm.pictures import read_pictures, recolour, seen, shade, warp
from demo.vlm.recipe import Optimizer, VlmRecipe, half_precision
from serving.engines.vlm.generation import question
from serving.engines.vlm.prompts import answer_tokens, inputs
from streams.publish.folders import FolderItem

SHAPE_SHARE = 0.5
"""Share of pictures that are recoloured and asked about shape only."""
ABOUT_COLOUR = ("is there anything ", "is some of it ")
"""Prefixes of yes/no questions whose answer changes with recolouring."""
NAME_WEIGHT = 2.0
"""Weight of pictures with a name: names are the hardest to learn."""


@dataclass(frozen=True)
class TokenizedQuestion:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    colour: bool
    kind: str


def learn(model: Any, processor: Any, items: Sequence[FolderItem], how: VlmRecipe, first: int = 0) -> float:
    """Train `model` on the questions, from round `first` on; returns the mean loss of the last tenth of the steps."""
    pictures = _Pictures(processor, items)
    model.train()
    loss = 0.0
    for number in range(first, len(how.steps)):
        loss = _round(model, pictures, how, number)
    model.eval()
    return loss


def _round(model: Any, pictures: _Pictures, how: VlmRecipe, number: int) -> float:
    parts = model.model
    groups = [(parts.vision_model, how.tower_lr), (parts.connector, 1.0), (parts.text_model, 1.0)]
    steps = how.steps[number]
    optimizer = Optimizer(groups, how, steps)
    generator = torch.Generator().manual_seed(how.seed + 3 + number)
    losses: list[float] = []
    for _ in track(range(steps), f"learning to answer, round {number + 1} of {len(how.steps)}", total=steps):
        shown, rows, owner = pictures.draw(how, generator)
        loss = answer_loss(model, shown, rows, owner)
        optimizer.step(loss)
        losses.append(float(loss.detach()))
        if len(losses) % 50 == 0:
            progress_log.info(f"step {len(losses)}: loss {sum(losses[-50:]) / 50:.3f}")
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


class _Pictures:
    def __init__(self, processor: Any, items: Sequence[FolderItem]) -> None:
        paths = sorted({item.path for item in items})
        self.images = read_pictures(paths, "reading pictures")
        where = {path: i for i, path in enumerate(paths)}
        self.questions: list[list[TokenizedQuestion]] = [[] for _ in paths]
        for item, row in zip(items, tokenize(processor, items), strict=True):
            self.questions[where[item.path]].append(row)
        named = [any(row.kind == "name" for row in rows) for rows in self.questions]
        self.weights = torch.tensor([NAME_WEIGHT if name else 1.0 for name in named])

    def draw(
        self, how: VlmRecipe, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[TokenizedQuestion], torch.Tensor]:
        """Pixels ``[how.pictures, 3, 64, 64]``, questions, and the picture index of each question."""
        chosen = torch.multinomial(self.weights, how.pictures, generator=generator)
        shape = torch.rand(how.pictures, generator=generator) < SHAPE_SHARE
        rows: list[TokenizedQuestion] = []
        owner: list[int] = []
        for place, (i, plain) in enumerate(zip(chosen.tolist(), shape.tolist(), strict=True)):
            fit = [row for row in self.questions[i] if not (plain and row.colour)]
            shape[place] = plain and bool(fit)
            fit = fit or self.questions[i]
            for pick in torch.randperm(len(fit), generator=generator)[: how.questions].tolist():
                rows.append(fit[pick])
                owner.append(place)
        shown = warp(self.images[chosen], generator)
        shown[shape] = recolour(shown[shape], generator)
        return seen(shade(shown, generator)), rows, torch.tensor(owner)


def tokenize(processor: Any, items: Sequence[FolderItem]) -> list[TokenizedQuestion]:
    """Prompts as in the engines, and answers; equal questions are rendered once."""
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    prompts: dict[str, tuple[int, ...]] = {}
    rows = []
    for item in items:
        if item.question not in prompts:
            batch = inputs(processor, [question(blank, item.question)])
            prompts[item.question] = tuple(batch["input_ids"][0].tolist())
        rows.append(
            TokenizedQuestion(
                prompts[item.question],
                tuple(answer_tokens(processor, item.answer)),
                item.label == "colour" or item.question.startswith(ABOUT_COLOUR),
                item.label,
            )
        )
    return rows


def answer_loss(
    model: Any, pixels: torch.Tensor, rows: Sequence[TokenizedQuestion], owner: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens; `pixels` ``[pictures, 3, 64, 64]``, `owner` each row's picture."""
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.full((len(rows), longest), int(model.config.text_config.pad_token_id))
    target = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.answer)
        ids[i, :start] = torch.tensor(row.prompt)
        ids[i, start:end] = torch.tensor(row.answer)
        target[i, start - 1 : end - 1] = torch.tensor(row.answer)
    with half_precision():
        features = model.model.connector(model.model.vision_model(pixel_values=pixels).last_hidden_state)
        embedded = model.model.text_model.get_input_embeddings()(ids)
        seats = ids == model.config.image_token_id
        embedded = embedded.masked_scatter(seats[..., None], features[owner].to(embedded.dtype))
        # Right padding after the counted tokens: causal attention needs no mask.
        hidden = model.model.text_model(inputs_embeds=embedded).last_hidden_state
        logits = model.lm_head(hidden[target >= 0])
    return functional.cross_entropy(logits.float(), target[target >= 0])
