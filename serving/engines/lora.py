"""Merges an adapter into a model: low-rank changes of weights, and weights that it replaces. Names and shapes come from
untrusted files: any mismatch raises :class:`core.errors.AdapterError`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.digests import digest_json, digest_tensor
from core.errors import AdapterError
from core.priority import yield_cpu
from serving.engines.adapters import AGAIN, MAX_RANK, PREFIX, AdapterFiles, is_finite, read_adapter
from serving.engines.clip_base import can_carry_lora

INNER_OUT_PROJ = ".base_layer.out_proj"
OUT_PROJ_TIMES = 2.0
"""PEFT 0.21 adds the delta of a MultiheadAttention's out_proj twice, in training and in ``merge_and_unload``: its
wrapper merges it and then lets the layer merge itself (``MultiheadAttention.merge``). Served weights must equal trained
ones, so the factor is part of the format; tests compare with PEFT and fail if PEFT changes."""

MAX_ALPHA = 2.0**127
"""Float32 range; the merged weights and golden inputs are checked as well."""
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,200}")
OTHER_BASE = "It was trained for another base; start the server with that one."


def whole_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Parameters that the adapter replaces (norms, biases, or full fine-tuning), by name."""
    return {
        key.removeprefix(PREFIX): tensor
        for key, tensor in files.tensors.items()
        if key.startswith(PREFIX) and not _KEY.fullmatch(key)
    }


def lora_layers(files: AdapterFiles) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """``lora_A``, ``lora_B`` and scale of each layer, by the layer's name in the file. The scale is alpha/r
    (alpha/sqrt(r) with rslora; Hu et al. 2021, Kalajdzievski 2023). Raises :class:`AdapterError` for other tensors,
    half a pair, or a rank that differs from the configured one."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    whole = whole_weights(files)
    for key, tensor in files.tensors.items():
        if key.removeprefix(PREFIX) in whole:
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"Adapter {files.name}: {key!r} is not a LoRA tensor.", "Save it with PEFT's LoRA.")
        if tensor.dim() < 2:
            raise AdapterError(f"Adapter {files.name}: {key} has the shape {list(tensor.shape)}, no matrix.", AGAIN)
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    layers = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"Adapter {files.name}: {module} has only one of lora_A and lora_B.", AGAIN)
        layers[module] = (pair["A"], pair["B"], _scale(files.config, module, pair["A"].shape[0]))
    return layers


@dataclass(frozen=True)
class ChangedWeight:
    name: str
    weight: torch.Tensor
    digest: str
    """Of the adapter's part only: the last bits of the merged weight depend on the processor."""


def effective_weights(adapter: Path | str | AdapterFiles, model: nn.Module) -> dict[str, torch.Tensor]:
    """All results of :func:`merge`, by name."""
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
    return {changed.name: changed.weight for changed in merge(files, model)}


def merge(files: AdapterFiles, model: nn.Module) -> Iterator[ChangedWeight]:
    """Yield ``W + s B A`` of each parameter that differs from the model's, one at a time, so that immediate use finds
    it in the CPU's cache. W is the model's own weight or the adapter's replacement. Targets are Linear, ungrouped
    convolutions and MultiheadAttention (``in_proj_weight`` and, through PEFT's wrapper, ``out_proj.weight``). Raises
    :class:`AdapterError` when names or shapes do not fit the model, or the sum overflows."""
    parameters = dict(model.named_parameters())
    whole = whole_weights(files)
    for name, tensor in whole.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = list(tensor.shape)
            raise AdapterError(f"Adapter {files.name}: the base has no parameter {name} {shape}.", OTHER_BASE)

    def differs(name: str, merged: torch.Tensor, weight: torch.Tensor) -> bool:
        yield_cpu()
        if not is_finite(merged):
            raise AdapterError(f"The adapter makes {name} overflow.", "Do not release it.")
        return not torch.equal(merged, weight)

    for layer in _layers(files, model):
        name, weight, own = layer.parameter, layer.weight.detach(), whole.pop(layer.parameter, None)
        replaced = weight if own is None else own.to(weight.device, weight.dtype)
        merged = layer.delta().to(weight.device, weight.dtype).add_(replaced)
        if differs(name, merged, weight):
            yield ChangedWeight(
                name, merged, digest_json([layer.digest(), own if own is None else digest_tensor("", own)])
            )
    for name, tensor in whole.items():
        weight = parameters[name].detach()
        merged = tensor.to(weight.device, weight.dtype)
        if differs(name, merged, weight):
            yield ChangedWeight(name, merged, digest_tensor("", tensor))


@dataclass(frozen=True)
class _Layer:
    files: AdapterFiles
    name: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: torch.Tensor

    def delta(self) -> torch.Tensor:
        """``s B A`` in the weight's shape. Raises AdapterError when the factors do not fit it."""
        a, b, weight = self.a, self.b, self.weight
        rank, out = a.shape[0], weight.shape[0]
        inner = weight.numel() // out
        fits = (
            1 <= rank <= MAX_RANK
            and a.dim() == b.dim() == weight.dim()
            and a.numel() == rank * inner
            and b.shape[:2] == (out, rank)
            and b.numel() == out * rank
            and a.shape[1:] == weight.shape[1:]
        )
        if not fits:
            raise AdapterError(
                f"Adapter {self.files.name}: {self.name} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"which do not fit its weight {list(weight.shape)}.",
                OTHER_BASE,
            )
        product = b.float().reshape(out, rank) @ a.float().reshape(rank, inner)
        return product.mul_(self.scale).reshape(weight.shape)

    def digest(self) -> str:
        """Equal for equal products, however the scale is split, and for any zero padding of the rank."""
        a, b = (side.detach().float() for side in (self.a, self.b))
        a, b = a.flatten(1), (b * self.scale).flatten(1)
        used = (a != 0).any(dim=1) & (b != 0).any(dim=0)
        return digest_json([digest_tensor("A", a[used]), digest_tensor("B", b[:, used])])


def _layers(files: AdapterFiles, model: nn.Module) -> Iterator[_Layer]:
    modules = dict(model.named_modules())
    for module_name, (a, b, scale) in lora_layers(files).items():
        # PEFT wraps a MultiheadAttention and reaches its out_proj through `base_layer`.
        plain_name = ".".join(part for part in module_name.split(".") if part != "base_layer")
        module = modules.get(plain_name)
        if module is None or not can_carry_lora(module):
            raise AdapterError(
                f"Adapter {files.name}: the base has no layer {plain_name!r} that takes LoRA.", OTHER_BASE
            )
        parameter = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        if module_name.endswith(INNER_OUT_PROJ):
            scale *= OUT_PROJ_TIMES
        yield _Layer(files, plain_name, f"{plain_name}.{parameter}", a, b, scale, getattr(module, parameter))


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    # The out_proj inside PEFT's wrapper has rank and alpha of its MultiheadAttention.
    owner = module.removesuffix(INNER_OUT_PROJ)
    declared = _by_pattern(config["rank_pattern"] or {}, owner, config["r"])
    if declared != rank or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"The adapter's configuration says rank {str(declared)[:40]} for {module}, its tensors have {rank}; "
            f"1 to {MAX_RANK} is served.",
            AGAIN,
        )
    alpha = _by_pattern(config["alpha_pattern"] or {}, owner, config["lora_alpha"])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise AdapterError(
            f"The adapter's configuration has the alpha {str(alpha)[:40]} for {module}, which is not a finite number.",
            AGAIN,
        )
    return alpha / rank**0.5 if config["use_rslora"] else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends in: PEFT's rule, restricted to plain names. PEFT takes
    regular expressions; an untrusted one could run forever."""
    for key, value in patterns.items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _PLAIN.fullmatch(name):
            raise AdapterError(
                f"The adapter's configuration selects layers by {key!r}, which is not a plain name.",
                "Write rank_pattern and alpha_pattern with module names.",
            )
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default
