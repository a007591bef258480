"""PEFT's LoRA on a base: the layers that learn, their start, and what is written at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from core.errors import AdapterError
from serving.engines.adapters import PREFIX, AdapterFiles, read_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.lora import whole_weights
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters.model import OTHER_BASE, AdapterModel, WholeWeights, plain_name, write_delta
from updater.adapters.weight_deltas import Dense, LowRank, WeightDelta, compress

NEGLIGIBLE = 1e-9
"""Singular values below this share of the largest are noise: their directions are initialised, or they stay zero."""


def read_delta(directory: Path, base: ClipBase | VlmBase) -> dict[str, LowRank | Dense]:
    """Read an adapter directory as changes to its base. Raises AdapterError, also for an adapter of another base."""
    files = read_adapter(directory)
    files.check_base(base)
    return delta_of(files, base)


def delta_of(files: AdapterFiles, base: ClipBase | VlmBase) -> dict[str, LowRank | Dense]:
    """Factors with the scale alpha/r folded in, and differences of whole weights."""
    if files.config["rank_pattern"] or files.config["alpha_pattern"] or files.config["use_rslora"]:
        raise AdapterError(
            f"Adapter {files.name} has ranks of its own per layer, which the trainer does not go on from.",
            "Release the base, or an adapter that Ratchet trained, and update from there.",
        )
    scale = files.config["lora_alpha"] / files.config["r"]
    delta: dict[str, LowRank | Dense] = {}
    whole = whole_weights(files)
    if whole:
        own = dict(base.build_model().named_parameters())
        unknown = sorted(name for name, value in whole.items() if name not in own or own[name].shape != value.shape)
        if unknown:
            shape = list(whole[unknown[0]].shape)
            raise AdapterError(f"Adapter {files.name} replaces {unknown[0]} {shape}, which the base lacks.", OTHER_BASE)
        delta |= {name: Dense(value.double() - own[name].detach().double()) for name, value in whole.items()}
    for key, a in files.tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            b = files.tensors[f"{module}.lora_B.weight"]
            delta[module.removeprefix(PREFIX)] = LowRank(a.flatten(1).double(), scale * b.flatten(1).double())
    return delta


class LoraModel(AdapterModel):
    """A base with LoRA layers on ``trained`` modules, and frozen ones on the incumbent's other layers. The same module
    is the teacher: :meth:`base` switches the adapter off."""

    def __init__(
        self,
        base: ClipBase | VlmBase,
        trained: Sequence[str],
        rank: int,
        alpha: float,
        start: WeightDelta,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """``trained``: layer names of the base. ``start``: factors to begin with; other layers begin at ΔW = 0."""
        from peft import LoraConfig, inject_adapter_in_model  # takes four seconds, and most importers train nothing

        self.frozen = base
        self.rank = rank
        self.alpha = alpha
        self.device = torch.device(device)
        factors = {name: part for name, part in start.items() if isinstance(part, LowRank)}
        carried = {plain_name(name) for name in factors} - {"", *trained}
        attention = {plain_name(name) for name in start if name.endswith(".base_layer.out_proj")}
        # MultiheadAttention is one target for PEFT, which reaches its out_proj by itself.
        self.targets = sorted(
            {*trained, *(name.removesuffix(".out_proj") if name in attention else name for name in carried)}
        )
        pattern = "|".join(re.escape(name) for name in self.targets)
        self.config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=f"(?:{pattern})", lora_dropout=0.0, bias="none"
        )
        model = base.build_model()
        self._whole = WholeWeights(model, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            injected = inject_adapter_in_model(self.config, model) if self.targets else model
        self.model = injected.eval().to(self.device)
        self.layers: dict[str, Any] = {
            name: module for name, module in self.model.named_modules() if "default" in getattr(module, "lora_A", {})
        }
        plain = {name: plain_name(name) for name in self.layers}
        learns = {name for name, own in plain.items() if {own, own.removesuffix(".out_proj")} & {*trained}}
        self.parameters: dict[str, nn.Parameter] = {}
        for name in sorted(self.layers):
            for side, layer in zip("AB", self._sides(name), strict=True):
                layer.weight.requires_grad_(name in learns)
                if name in learns:
                    self.parameters[f"{name}.lora_{side}"] = layer.weight
        self._start_delta = factors
        self._start(factors)
        self._attention = [
            (layer, layer.get_base_layer().in_proj_weight.detach().clone(),
             layer.get_base_layer().out_proj.get_base_layer().weight.detach().clone())
            for layer in self.layers.values()
            if isinstance(layer.get_base_layer(), nn.MultiheadAttention)
        ]  # fmt: skip

    def _sides(self, name: str) -> tuple[Any, Any]:
        return self.layers[name].lora_A["default"], self.layers[name].lora_B["default"]

    @torch.no_grad()
    def _start(self, start: Mapping[str, LowRank]) -> None:
        unknown = sorted(set(start) - set(self.layers))
        if unknown:
            raise AdapterError(
                f"The incumbent changes {unknown[0]}, where base {self.frozen.name!r} has no layer that takes LoRA.",
                OTHER_BASE,
            )
        scale = self.alpha / self.rank
        for name, factor in start.items():
            a, b = self._sides(name)
            small = compress(factor, self.rank)
            strength = small.b.norm(dim=0)
            used = strength > NEGLIGIBLE * strength.max().clamp_min(1e-30)
            rows = used.view(-1, *[1] * (a.weight.dim() - 1)).to(a.weight.device)
            a.weight.copy_(torch.where(rows, small.a.view_as(a.weight).to(a.weight), a.weight))
            b.weight.copy_((small.b / scale).reshape(b.weight.shape))

    @property
    def base_names(self) -> list[str]:
        return sorted({*map(plain_name, self.layers), *(name.rpartition(".")[0] for name in self._whole.delta)})

    def restore(self) -> None:
        """Undo rounding in attention weights, where PEFT adds and subtracts ΔW at every pass so that W drifts.
        Otherwise a resumed run, which starts from the exact W, would end differently from an uninterrupted one."""
        with torch.no_grad():
            for layer, in_proj, out_proj in self._attention:
                attention = layer.get_base_layer()
                attention.in_proj_weight.data.copy_(in_proj)
                attention.out_proj.get_base_layer().weight.data.copy_(out_proj)

    @contextmanager
    def base(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.enable_adapters(False)
        self._whole.use(False)
        try:
            yield
        finally:
            self._whole.use(True)
            for layer in self.layers.values():
                layer.enable_adapters(True)
            # PEFT switches gradients on with the adapter; carried layers stay frozen.
            for name in self.layers:
                for side, part in zip("AB", self._sides(name), strict=True):
                    part.weight.requires_grad_(f"{name}.lora_{side}" in self.parameters)

    def delta(self) -> dict[str, LowRank | Dense]:
        scale = self.alpha / self.rank
        return self._whole.delta | {
            name: LowRank(
                a.weight.detach().flatten(1).double().cpu(), scale * b.weight.detach().flatten(1).double().cpu()
            )
            for name, (a, b) in ((name, self._sides(name)) for name in self.layers)
        }

    def write(self, delta: WeightDelta, directory: Path) -> str:
        learned = {name for name in self.layers if f"{name}.lora_A" in self.parameters}
        unchanged = {name: factor for name, factor in self._start_delta.items() if name not in learned}
        return write_delta(
            self.frozen,
            delta,
            directory,
            rank=self.rank,
            alpha=self.alpha,
            config=self.config.to_dict(),
            unchanged=unchanged,
        )


def trainer_encoder(base: ClipBase, directory: Path) -> Callable[[NDArray[np.uint8], list[str]], tuple[Any, Any]]:
    """Encode as the trainer does, with PEFT's unmerged layers, for comparison with the server's vectors. The returned
    function takes uint8 [n, S, S, 3] and texts; it returns two float32 arrays [n, dim] of unit length."""
    files = read_adapter(directory)
    delta = delta_of(files, base)
    model = LoraModel(base, (), files.config["r"], files.config["lora_alpha"], delta, seed=0)
    tokenize = base.tokenizer()

    @torch.inference_mode()
    def encode(pixels: NDArray[np.uint8], texts: list[str]) -> tuple[Any, Any]:
        clip = cast(Any, model.model)
        images = F.normalize(clip.encode_image(base.preprocess.normalise(pixels)), dim=-1)
        words = F.normalize(clip.encode_text(tokenize(texts)), dim=-1)
        return images.numpy(), words.numpy()

    return encode
