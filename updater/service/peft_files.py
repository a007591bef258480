"""Checks PEFT directories against a base, and rewrites them as Ratchet's adapter directories. Each field of the
configuration is either honoured or rejected, never ignored, so that the served model is what PEFT means. rsLoRA and
ranks or alphas per layer are honoured: their scale goes into ``lora_B``, and smaller ranks are padded with zeros, so
the stored adapter is plain LoRA of one rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from core.errors import AdapterError
from serving.engines.adapters import (
    ABOUT,
    CONFIG,
    MAX_BYTES,
    MAX_RANK,
    PREFIX,
    WEIGHTS,
    AdapterFiles,
    canonical_config,
    check_dim,
    is_finite,
    read_json,
    write_adapter,
)
from serving.engines.clip_base import ClipBase, can_carry_lora
from serving.engines.heads import read_heads
from serving.engines.lora import INNER_OUT_PROJ, effective_weights, lora_layers
from serving.engines.vlm.adapters import linear_shapes
from serving.engines.vlm.vlm_base import VlmBase
from updater.adapters.model import plain_name

Shapes = Mapping[str, tuple[int, ...]]
NAMED: Final = 10
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_OUR_TARGETS = re.compile(r"\(\?:[\w\\.|-]*\)")
"""Targets as the trainer writes them: alternatives of escaped names. No other expression from outside is kept."""
_DTYPES = ("F64", "F32", "F16", "BF16")
_PLAIN_START = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base's weights unchanged; PiSSA, OLoRA, CorDA, MiCA, LoftQ and LoRA-GA
change them, and their adapters are differences to that changed base."""
_TRAINING_ONLY = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
})  # fmt: skip
"""Fields about training or the choice of layers, which the tensors show themselves."""
_HONOURED = frozenset({
    "alpha_pattern", "bias", "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
})  # fmt: skip
_AGAIN = "Save it again with PEFT's `save_pretrained`."
_OTHER_BASE = "It was trained for another model: import it where that is the base."


@dataclass(frozen=True)
class Named:
    family: str | None = None
    base_digest: str | None = None
    name: str | None = None


def named(directory: Path) -> Named:
    """Read ``ratchet.json``, if there is one. Raises AdapterError if it cannot be read."""
    if not (directory / ABOUT).is_file():
        return Named()
    about = read_json(directory / ABOUT)
    fields = {field: about.get(field) for field in ("family", "base_digest", "name")}
    wrong = [field for field, value in fields.items() if not isinstance(value, str)]
    if wrong:
        raise AdapterError(
            f"{directory / ABOUT}: {wrong[0]} is not text.", "Export it again, or remove the file and give --base."
        )
    return Named(**fields)


def convert(directory: Path, base: ClipBase | VlmBase, max_rank: int, target: Path) -> str:
    """Check a PEFT directory and write it to the new directory ``target``; returns the adapter's name. ``max_rank``:
    highest rank that is served. Raises AdapterError: names the field, file or module that does not fit, and a fix."""
    config = _checked_config(read_json(directory / CONFIG))
    shapes, parameters = _base_shapes(base)
    tensors = _read_tensors(directory / WEIGHTS, shapes, parameters, min(max_rank, MAX_RANK))
    files = AdapterFiles("(import)", base.family, base.digest, config, tensors)
    lora_layers(files)  # ranks and alphas are those of the configuration
    if config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"]:
        config, tensors = _plain(files)
    config["target_modules"] = _targets(config["target_modules"], tensors)
    heads = read_heads(directory)
    if isinstance(base, ClipBase):
        model = base.build_model()
        files = AdapterFiles("(import)", base.family, base.digest, config, tensors, heads=heads)
        check_dim(files, base.dim)
        effective_weights(files, model)  # raises where a sum overflows
    elif heads:
        raise AdapterError(f"{directory} has heads, which a VLM has no use for.", "Remove heads.safetensors.")
    return write_adapter(target, tensors, config, base, heads)


def _checked_config(config: dict[str, Any]) -> dict[str, Any]:
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_START:
        raise AdapterError(
            f"adapter_config.json: init_lora_weights is {str(start)[:40]!r}, which changes the base's own weights.",
            "Save it with `path_initial_model_for_weight_conversion`, which makes plain LoRA of it.",
        )
    plain = canonical_config(config)  # refuses what it knows and is not served
    unknown = [key for key, value in config.items() if value and key not in _TRAINING_ONLY | _HONOURED]
    if unknown:
        raise AdapterError(
            f"adapter_config.json: {unknown[0][:60]} is set, which is not served.",
            "Train a plain LoRA adapter, or merge what it adds into one.",
        )
    rank = plain["r"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"adapter_config.json: r is {str(rank)[:40]!r}, which is not a rank.", _AGAIN)
    if not isinstance(plain["use_rslora"], bool):
        raise AdapterError("adapter_config.json: use_rslora is neither true nor false.", _AGAIN)
    return plain


def _base_shapes(base: ClipBase | VlmBase) -> tuple[Shapes, Shapes]:
    if isinstance(base, VlmBase):
        return dict(linear_shapes(base)), {}
    model = base.build_model()
    layers = {
        name: tuple((m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight).shape)
        for name, m in model.named_modules()
        if can_carry_lora(m)
    }
    return layers, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _read_tensors(path: Path, layers: Shapes, parameters: Shapes, max_rank: int) -> dict[str, torch.Tensor]:
    """Tensors under PEFT's names; names, shapes and types are checked in the header before values are read."""
    if not path.is_file():
        others = [p.name for p in path.parent.glob("adapter_model.*")]
        hint = f" (there is {others[0]}: pickle files are never read)" if others else ""
        raise AdapterError(
            f"{path.parent} is no PEFT directory: {path.name} is missing{hint}.",
            "Save it with `save_pretrained(..., safe_serialization=True)`.",
        )
    if path.stat().st_size > MAX_BYTES:
        raise AdapterError(f"{path} is larger than {MAX_BYTES >> 30} GiB.", "That is no LoRA adapter.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_names(keys, layers, parameters)
            for key in keys:
                header = file.get_slice(key)
                if header.get_dtype() not in _DTYPES:
                    raise AdapterError(
                        f"{key} is {header.get_dtype()}, which is not served.", "Save it as float32 or half precision."
                    )
                module, side = _module(key)
                weight = (layers if side else parameters)[module]
                _check_shape(key, side, tuple(header.get_shape()), weight, max_rank)
            tensors = {_peft_name(key): file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a safetensors file, or was cut short: {error}.", _AGAIN) from error
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterError(
                f"{key} holds values that are not finite numbers.", "The training diverged: lower its learning rate."
            )
    return tensors


def _check_names(keys: list[str], layers: Shapes, parameters: Shapes) -> None:
    if not keys:
        raise AdapterError(f"{WEIGHTS} holds no tensors.", _AGAIN)
    if len({_peft_name(key) for key in keys}) < len(keys):
        raise AdapterError(f"{WEIGHTS} has a tensor twice, with and without {PREFIX!r}.", _AGAIN)
    modules = {_module(key) for key in keys}
    unknown = sorted({module for module, side in modules if module not in (layers if side else parameters)})
    if unknown:
        listed = ", ".join(name[:100] for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise AdapterError(
            f"the base has no layer that takes LoRA, and no parameter, of the names {listed}{more}.",
            "Module names must be those of the base (`ratchet base show`): for a CLIP open_clip's, for a VLM "
            "transformers'. An adapter of another model or library does not fit.",
        )


def _module(key: str) -> tuple[str, str]:
    """Base layer and side of a LoRA tensor; for another tensor its own name and ''."""
    plain = key.removeprefix(PREFIX)
    match = _KEY.fullmatch(plain)
    if match is None:
        return plain, ""
    return plain_name(match["module"]), match["side"]


def _check_shape(key: str, side: str, shape: tuple[int, ...], weight: tuple[int, ...], max_rank: int) -> None:
    rank = shape[0 if side == "A" else 1] if side and len(shape) == len(weight) else 0
    wanted = {"A": (rank, *weight[1:]), "B": (weight[0], rank, *[1] * (len(weight) - 2)), "": weight}[side]
    if shape != wanted or (side and rank < 1):
        raise AdapterError(
            f"{key} has the shape {list(shape)}, which does not fit {list(weight)} of the base.", _OTHER_BASE
        )
    if side and rank > max_rank:
        raise AdapterError(
            f"{key} has rank {rank}; {max_rank} is served.",
            "Compress it to a lower rank; for a VLM serve.vlm_max_rank can be raised.",
        )


def _plain(files: AdapterFiles) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    layers = lora_layers(files)
    rank = max(a.shape[0] for a, _, _ in layers.values())
    tensors = {key: tensor for key, tensor in files.tensors.items() if not _module(key)[1]}
    for module, (a, b, scale) in layers.items():
        own = a.shape[0]
        wide_a = torch.zeros(rank, *a.shape[1:])
        wide_b = torch.zeros(b.shape[0], rank, *b.shape[2:])
        wide_a[:own], wide_b[:, :own] = a.float(), scale * b.float()
        tensors[f"{PREFIX}{module.removeprefix(PREFIX)}.lora_A.weight"] = wide_a
        tensors[f"{PREFIX}{module.removeprefix(PREFIX)}.lora_B.weight"] = wide_b
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "r": rank, "lora_alpha": rank}
    return {**files.config, **plain}, tensors


def _targets(targets: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Target modules: names, or an expression written by the trainer. Any other expression is replaced by the names of
    the layers, so that no outside regular expression reaches programs that read the adapter later."""
    if (isinstance(targets, str) and _OUR_TARGETS.fullmatch(targets)) or (isinstance(targets, list) and targets):
        return targets
    modules = {match["module"] for key in tensors if (match := _KEY.fullmatch(key.removeprefix(PREFIX)))}
    return sorted(module.removesuffix(INNER_OUT_PROJ) for module in modules)


def _peft_name(key: str) -> str:
    return PREFIX + key.removeprefix(PREFIX)
