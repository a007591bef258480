"""In which precision a model's passes run in training: float32, or bfloat16 where the processor multiplies it fast.

Mixed precision (Micikevicius et al. 2018) by torch's autocast: only the products of a pass are in bfloat16. Weights,
what learns, its gradients and optimizer state stay float32, and so do the features, logits and losses that come of a
pass. bfloat16 has float32's range, so that no loss is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from serving.engines.backends import processor
from serving.engines.clip_base import ClipBase
from serving.engines.engine_choice import SMALL_BYTES
from serving.engines.vlm.vlm_base import VlmBase
from updater.recipes import Recipe, TrainPrecision


def training_precision(recipe: Recipe, base: ClipBase | VlmBase, device: torch.device) -> TrainPrecision:
    """What the recipe says. ``auto`` is bfloat16 on a processor that multiplies it fast, but for a small base: there
    products are a small part of a pass, as in serving.
    """
    if recipe.precision != "auto":
        return recipe.precision
    fast = processor(device.type).multiplies_bfloat16_fast
    return "bfloat16" if fast and base.weights_bytes >= SMALL_BYTES else "float32"


@contextmanager
def computing(precision: TrainPrecision, device: torch.device) -> Iterator[None]:
    """Inside, passes run in this precision. Outputs may be bfloat16; whoever takes them makes them float32."""
    if precision == "float32":
        yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's fused attention of inference knows no autocast on a CPU
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
