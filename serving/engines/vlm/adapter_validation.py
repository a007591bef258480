"""Whether an adapter directory may be shown to an engine: ours is the check that comes before vLLM or PEFT see it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from core.errors import AdapterError
from serving.engines.adapters import AdapterFiles, read_adapter
from serving.engines.lora import lora_layers, whole_weights
from serving.engines.vlm.vlm_base import VlmBase

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of the weight of each linear layer, by its name in the transformers model."""


def linear_shapes(base: VlmBase) -> Shapes:
    """Layers that can carry LoRA, read from the configuration alone: no weights are loaded."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(base.model, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and base.part_of(name) is not None
    }


def read_validated_adapter(base: VlmBase, shapes: Shapes, name: str, directory: Path, max_rank: int) -> AdapterFiles:
    """The adapter in ``directory``, when it is ``name``, undamaged, finite, of this base, and of a rank that is served.

    Raises:
        AdapterError: says which of these does not hold.
    """
    files = read_adapter(directory)
    if files.name != name:
        raise AdapterError(
            f"{directory} holds {files.name}, not {name}.", "Fetch the adapter again under its own name."
        )
    files.check_base(base)
    whole = whole_weights(files)
    if whole:
        raise AdapterError(
            f"Adapter {name} replaces {next(iter(whole))}, and a VLM is served with LoRA alone.",
            "Train it with a recipe whose adapter is low-rank.",
        )
    for module, (a, b, _) in lora_layers(files).items():
        shape = shapes.get(module)
        if shape is None:
            raise AdapterError(f"Adapter {name}: the base has no layer {module!r} that takes LoRA.", _OTHER)
        rank = a.shape[0]
        if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank) or rank < 1:
            raise AdapterError(
                f"Adapter {name}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"which do not fit its weight {list(shape)}.",
                _OTHER,
            )
        if rank > max_rank:
            raise AdapterError(
                f"Adapter {name}: {module} has rank {rank}; this server takes {max_rank}.",
                "Raise serve.vlm_max_rank and restart, or compress the adapter.",
            )
    return files


def parts_of(base: VlmBase, files: AdapterFiles) -> frozenset[str]:
    """Parts of the model that the adapter touches: ``image``, ``connector``, ``text``."""
    return frozenset(part for module in lora_layers(files) if (part := base.part_of(module)) is not None)


_OTHER = "It was trained for another base; start the server with that one."
