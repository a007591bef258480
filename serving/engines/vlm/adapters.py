"""Adapters of a VLM engine: validated before vLLM or PEFT read them, probed, and kept for their requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from core.digests import digest12, digest_json
from core.errors import AdapterError
from serving.engines.adapters import CONFIG, WEIGHTS, AdapterFiles, read_adapter_of
from serving.engines.lora import OTHER_BASE, lora_layers, whole_weights
from serving.engines.processor import golden_pixels
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, question
from serving.engines.vlm.vlm_base import VlmBase

T = TypeVar("T")
BASE: Final = ""
Shapes = Mapping[str, tuple[int, ...]]
"""Weight shape of each linear layer, by name in the transformers model."""
SIDE: Final = 64
QUESTIONS: Final = ("what is this?", "is there something red? answer yes or no.")
PROBED: Final = ("image", "connector")
"""Parts of a model whose adapters some engines silently ignore."""
PROBE_SIZE: Final = 0.1
"""Size of the entries of a probe's delta: many times those of any weight, so that an applied one shows."""
SAME: Final = 0.01
"""Log-probabilities that differ by less are equal, within bfloat16 on a GPU."""


def linear_shapes(base: VlmBase) -> Shapes:
    """Layers that can carry LoRA, from the configuration alone, without loading weights."""
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
    """Read the adapter in ``directory``. Raises :class:`AdapterError` when it is not ``name``, is damaged or not
    finite, belongs to another base, replaces whole weights, or exceeds ``max_rank``."""
    files = read_adapter_of(base, name, directory)
    whole = whole_weights(files)
    if whole:
        raise AdapterError(
            f"Adapter {name} replaces {next(iter(whole))}, and a VLM is served with LoRA alone.",
            "Train it with a recipe whose adapter is low-rank.",
        )
    for module, (a, b, _) in lora_layers(files).items():
        shape = shapes.get(module)
        if shape is None:
            raise AdapterError(f"Adapter {name}: the base has no layer {module!r} that takes LoRA.", OTHER_BASE)
        rank = a.shape[0]
        if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank) or rank < 1:
            raise AdapterError(
                f"Adapter {name}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"which do not fit its weight {list(shape)}.",
                OTHER_BASE,
            )
        if rank > max_rank:
            raise AdapterError(
                f"Adapter {name}: {module} has rank {rank}; this server takes {max_rank}.",
                "Raise serve.vlm_max_rank and restart, or compress the adapter.",
            )
    return files


def parts_of(base: VlmBase, files: AdapterFiles) -> frozenset[str]:
    """Parts of the model that the adapter changes: ``image``, ``connector``, ``text``."""
    return frozenset(part for module in lora_layers(files) if (part := base.part_of(module)) is not None)


def golden_requests() -> list[GenerationRequest]:
    """Two generated pictures with one question each, eight tokens per answer."""
    pictures = golden_pixels(SIDE)
    return [question(pictures[i], text, max_tokens=8) for i, text in enumerate(QUESTIONS)]


def fingerprint(adapter: str | None, replies: Sequence[GenerationResult]) -> str:
    """12 hex digits of the answers' tokens, and their mean log-probability. Raises :class:`AdapterError`: not
    finite."""
    logprobs = [value for reply in replies for value in reply.logprobs]
    if not logprobs or not all(map(math.isfinite, logprobs)):
        raise AdapterError(
            f"{adapter or 'The base'} answers golden questions with log-probabilities that are not finite.",
            "Do not release it; look at the training run.",
        )
    tokens = digest12(digest_json([list(reply.tokens) for reply in replies]))
    return f"{tokens}:{sum(logprobs) / len(logprobs):.2f}"


def write_probe(directory: Path, shapes: Shapes, size: float, seed: int = 0) -> Path:
    """Write a rank-1 LoRA in PEFT's format over all ``shapes``, with delta entries of about ``size``. It is not a
    Ratchet adapter: engines load it at start to find out which adapters they apply."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, (out, inner) in sorted(shapes.items()):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(1, inner, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, 1, generator=generator) * size
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[-1] for name in shapes})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": leaves, "bias": "none"}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def differ(some: Sequence[GenerationResult], others: Sequence[GenerationResult]) -> bool:
    return any(
        one.tokens != other.tokens or any(abs(a - b) > SAME for a, b in zip(one.logprobs, other.logprobs, strict=True))
        for one, other in zip(some, others, strict=True)
    )


@dataclass(eq=False)
class _Resident(Generic[T]):
    value: T
    users: int = 0
    leaving: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Residents(Generic[T]):
    """Resident adapters with the number of requests that use them; ``T`` is the engine's object for one. Includes
    :data:`BASE`. An adapter is dropped only after its last request. Use from one event loop."""

    def __init__(self, most: int) -> None:
        """``most``: adapters held at once, including those that finish their last requests."""
        self._most = most
        self._all: dict[str, _Resident[T]] = {}
        self._changing = asyncio.Lock()

    def names(self) -> frozenset[str]:
        return frozenset(name for name, one in self._all.items() if not one.leaving) - {BASE}

    def running(self) -> int:
        return sum(one.users for one in self._all.values())

    async def add(self, name: str, make: Callable[[], Awaitable[T]]) -> None:
        """Hold ``name``, made by ``make`` if it is missing. Raises :class:`AdapterError` when there is no room."""
        async with self._changing:
            there = self._all.get(name)
            if there is not None:
                there.leaving = False
                there.idle.set()
                return
            if len(self._all) >= self._most:
                others = ", ".join(sorted(filter(None, self._all)))
                raise AdapterError(
                    f"There is no room for {name}: {others} are resident or still in use.",
                    "Unload one, wait for its last request, or raise serve.rollback_window.",
                )
            self._all[name] = _Resident(await make())

    async def remove(self, name: str, drop: Callable[[T], Awaitable[None]] | None = None) -> None:
        """Stop new requests for ``name``, wait for the last one, then ``drop`` it. Unknown names are ignored."""
        resident = self._all.get(name)
        if resident is None or resident.leaving:
            return
        resident.leaving = True
        while resident.users and resident.leaving:
            resident.idle.clear()
            await resident.idle.wait()
        async with self._changing:
            if resident.leaving and not resident.users:  # otherwise it was added again meanwhile
                del self._all[name]
                if drop is not None:
                    await drop(resident.value)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[T]:
        """Hold an adapter, or the base, during a request. Raises :class:`AdapterError` when it is not resident."""
        resident = self._all.get(adapter or BASE)
        if resident is None or resident.leaving:
            raise AdapterError(
                f"Adapter {adapter} is not resident (resident: {', '.join(sorted(self.names())) or 'none'}).",
                "Load it first.",
            )
        resident.users += 1
        try:
            yield resident.value
        finally:
            resident.users -= 1
            if not resident.users:
                resident.idle.set()
