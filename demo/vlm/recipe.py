"""Training of the shipped VLM, about 25 minutes of one core. The committed asset used the defaults, with questions of
version 1 of `vqa_base` (exact titles instead of names) in its first round and version 2 in its second. `python -m
demo.vlm` uses only version 2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class VlmRecipe:
    """Both stages. A step of the first shows `tower_batch` pictures, one of the second `pictures` with questions."""

    views: int = 2
    """Augmented views per picture for the teacher."""
    tower_steps: int = 330
    tower_batch: int = 128
    steps: tuple[int, ...] = (650, 520)
    """Of the second stage, per round; the learning rate decays to zero in each."""
    pictures: int = 72
    questions: int = 3
    lr: float = 2e-3
    """For matrices; other parameters use half."""
    tower_lr: float = 0.6
    """Learning rate of the vision tower in the second stage, relative to `lr`."""
    weight_decay: float = 0.05
    warmup_steps: int = 60
    seed: int = 0
    threads: int = 1


def half_precision() -> torch.autocast:
    """Autocast to bfloat16 with AVX-512; without it bfloat16 is many times slower than float32."""
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


class Optimizer:
    """Muon for matrices inside the layers, AdamW for embeddings, norms and heads; warmup, then cosine decay to zero.
    Muon (Jordan et al. 2024) needs about half the steps here; its step is scaled to AdamW's size."""

    def __init__(self, groups: Iterable[tuple[nn.Module, float]], how: VlmRecipe, steps: int) -> None:
        self.parameters: list[nn.Parameter] = []
        matrices: list[dict[str, object]] = []
        others: list[dict[str, object]] = []
        for module, scale in groups:
            named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
            inner = [p for name, p in named if p.dim() == 2 and "embed" not in name]
            outer = [p for name, p in named if p.dim() != 2 or "embed" in name]
            matrices += [{"params": inner, "lr": how.lr * scale}] if inner else []
            others += [{"params": outer, "lr": how.lr * scale / 2}] if outer else []
            self.parameters += [p for _, p in named]
        muon = torch.optim.Muon(matrices, weight_decay=how.weight_decay, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, weight_decay=how.weight_decay, betas=(0.9, 0.98))
        self.inner: tuple[torch.optim.Optimizer, ...] = (muon, adam)

        def share(step: int) -> float:
            return min(1.0, (step + 1) / how.warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in self.inner]

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.inner, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
