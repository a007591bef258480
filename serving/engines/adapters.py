"""Adapters: LoRA deltas in PEFT's file format, named by their content.

An adapter directory holds these files and is never rewritten:

    adapter_model.safetensors   PEFT's tensors: <module>.lora_A.weight [r, in], <module>.lora_B.weight [out, r];
                                for what low rank cannot say (norms, biases, whole weights) the parameter itself
    adapter_config.json         PEFT's configuration, in canonical order
    ratchet.json                {"format", "family", "name", "base", "base_digest"}
    heads.safetensors           where it has some: classifiers over its image space, see serving.engines.heads

The name is ``clip-`` or ``vlm-`` and 12 hex digits of SHA-256 over tensors, configuration, the base's digest, heads.
Everything here distrusts the directory: whatever is wrong raises :class:`ops.errors.AdapterError`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ops.digests import digest12, digest_bytes, digest_json, digest_tensor, digest_tensors
from ops.errors import AdapterError
from ops.priority import breathe
from serving.engines.clip_base import ClipBase, can_carry_lora
from serving.engines.heads import Head, heads_digest, read_heads, write_heads
from serving.engines.vlm.vlm_base import VlmBase

FORMAT = 1
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ABOUT = "ratchet.json"
NO_HEADS: Mapping[str, Head] = {}
MAX_RANK = 1024
MAX_ALPHA = 2.0**127
"""Of a float32; what an adapter adds is checked again when it is merged and by golden inputs."""
MAX_BYTES = 4 << 30
"""Far above any LoRA of a CLIP; a bound, so that a wrong file cannot fill the memory."""

_MEANINGFUL: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "bias": "none",
}
"""Fields of a PEFT configuration that say what the tensors mean, with PEFT's defaults."""
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config", "kasa_config",
    "arrow_config", "monteclora_config",
)  # fmt: skip
PREFIX = "base_model.model."
"""What PEFT puts before every name."""
_PLAIN = re.compile(r"[A-Za-z0-9_.]{1,200}")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter directory holds, after the checks that need no model."""

    name: str
    family: str
    base_digest: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base_name: str = ""
    """What its base was called where it was made."""
    heads: Mapping[str, Head] = field(default_factory=dict)

    def check_base(self, base: ClipBase | VlmBase) -> None:
        """Raise :class:`AdapterError` when it belongs to another base than this one."""
        if self.base_digest != base.digest:
            raise AdapterError(
                f"Adapter {self.name} belongs to the base {self.base_name[:64]!r} ({digest12(self.base_digest)}), "
                f"and this one is {base.name!r} ({digest12(base.digest)}).",
                "Start with that base, or learn on this one what was learned: `ratchet base upgrade`.",
            )


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that matter, plain and ordered, so that equal adapters have equal names.

    Raises :class:`AdapterError` for variants of LoRA that are not merged as ``W + s B A``.
    """
    on = [key for key in _UNSUPPORTED if config.get(key)]
    kind = getattr(config.get("peft_type", "LORA"), "value", config.get("peft_type", "LORA"))
    if on or kind != "LORA" or config.get("bias", "none") != "none":
        what = on[0] if on else ("bias" if kind == "LORA" else f"peft_type={kind}")
        raise AdapterError(f"The adapter uses {what}, which is not served.", "Train a plain LoRA adapter.")
    plain = {key: config.get(key, default) for key, default in _MEANINGFUL.items()}
    plain["peft_type"] = "LORA"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(plain[key] or {}, dict):
            raise AdapterError(f"The adapter's configuration: {key} is no object.", _AGAIN)
    targets = plain["target_modules"]
    if isinstance(targets, list | tuple | set):
        plain["target_modules"] = sorted(map(str, targets))
    return plain


def content_name(
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    base_digest: str,
    family: str = "clip",
    heads: Mapping[str, Head] = NO_HEADS,
) -> str:
    """``<family>-<digest12>`` of the content."""
    what = [digest_tensors(tensors), digest_json(canonical_config(config)), base_digest]
    what += [heads_digest(heads)] if heads else []
    return f"{family}-{digest12(digest_bytes(*(part.encode() for part in what)))}"


def adapter_name(directory: Path | str) -> str:
    """The name that the directory's content has: ``clip-<digest12>``. Checks all but the fit to a base."""
    return read_adapter(directory).name


def write_adapter(
    directory: Path | str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    base: ClipBase | VlmBase,
    heads: Mapping[str, Head] = NO_HEADS,
) -> str:
    """Write an adapter directory in one step and return its name; an existing equal one is left alone.

    ``tensors`` and ``config`` as PEFT makes them (``get_peft_model_state_dict``, ``LoraConfig.to_dict()``).
    """
    target = Path(directory)
    weights = {k: v.detach().to("cpu").contiguous().clone() for k, v in sorted(tensors.items())}
    plain = canonical_config(config)
    name = content_name(weights, plain, base.digest, base.family, heads)
    if target.exists():
        there = adapter_name(target)
        if there != name:
            raise AdapterError(
                f"{target} already holds {there}; a directory is never rewritten.",
                "Write to a new directory, best named after its adapter.",
            )
        return name
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".adapter-", dir=target.parent))
    try:
        save_file(weights, work / WEIGHTS, metadata={"format": "pt"})
        (work / CONFIG).write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
        about = {"format": FORMAT, "family": base.family, "name": name, "base": base.name, "base_digest": base.digest}
        (work / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        if heads:
            write_heads(work, heads)
        work.chmod(0o755)
        try:
            work.rename(target)
        except OSError:
            # Somebody else was faster: fine if it is the same adapter.
            if not target.exists() or adapter_name(target) != name:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return name


def read_adapter(directory: Path | str) -> AdapterFiles:
    """Read an adapter directory and check its files against its own name.

    Raises :class:`AdapterError`: files missing, cut short, not safetensors, not finite, or not what they were.
    """
    path = Path(directory)
    about, config = read_json(path / ABOUT), read_json(path / CONFIG)
    tensors = _read_tensors(path / WEIGHTS)
    try:
        family, base_digest, claimed = (str(about[key]) for key in ("family", "base_digest", "name"))
    except KeyError as error:
        raise AdapterError(f"{path / ABOUT} has no field {error}.", _AGAIN) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise AdapterError(f"Adapter {claimed}: {key} is {tensor.dtype}, which is not served.", _SAVE)
        if not is_finite(tensor):
            raise AdapterError(
                f"Adapter {claimed}: {key} holds values that are not finite numbers.",
                "The training run diverged: do not release it; lower the learning rate.",
            )
    heads = read_heads(path)
    name = content_name(tensors, config, base_digest, family, heads)
    if name != claimed:
        raise AdapterError(
            f"Adapter {claimed}: its files have the digest of {name}; they are damaged or were changed.", _AGAIN
        )
    return AdapterFiles(name, family, base_digest, canonical_config(config), tensors, str(about.get("base", "")), heads)


def check_dim(files: AdapterFiles, dim: int) -> None:
    """Raise :class:`AdapterError` when a head is of vectors of another size than the base's."""
    for name, head in files.heads.items():
        if head.means.shape[1] != dim:
            raise AdapterError(f"Adapter {files.name}: head {name} is of {head.means.shape[1]} dimensions.", _AGAIN)


def whole_weights(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Parameters that the adapter replaces as a whole, by parameter name: norms, biases, or full fine-tuning."""
    return {
        key.removeprefix(PREFIX): tensor
        for key, tensor in files.tensors.items()
        if key.startswith(PREFIX) and not _KEY.fullmatch(key)
    }


def lora_layers(files: AdapterFiles) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """``lora_A``, ``lora_B`` and the scale of each layer, by the name that its tensors have.

    The scale is alpha/r (alpha/sqrt(r) with rslora; Hu et al. 2021, Kalajdzievski 2023).
    Raises :class:`AdapterError` for other tensors, half a pair, or a rank that is not the configured one.
    """
    sides: dict[str, dict[str, torch.Tensor]] = {}
    whole = whole_weights(files)
    for key, tensor in files.tensors.items():
        if key.removeprefix(PREFIX) in whole:
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"Adapter {files.name}: {key!r} is no LoRA tensor.", "Save it with PEFT's LoRA.")
        if tensor.dim() < 2:
            raise AdapterError(f"Adapter {files.name}: {key} has the shape {list(tensor.shape)}, no matrix.", _AGAIN)
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    layers = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"Adapter {files.name}: {module} has only one of lora_A and lora_B.", _AGAIN)
        layers[module] = (pair["A"], pair["B"], _scale(files.config, module, pair["A"].shape[0]))
    return layers


@dataclass(frozen=True)
class ChangedWeight:
    """A parameter that an adapter changes."""

    name: str
    weight: torch.Tensor
    digest: str
    """Of what it is made from beside the base. The weight itself is not the same everywhere: the last bits of a product
    depend on the processor."""


def delta_weights(adapter: Path | str | AdapterFiles, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What the adapter adds: names of the parameters that it touches, and ``s B A`` in the shape of each, float32, the
    caller's to change. One at a time: together they are as large as the model.

    Targets are Linear, convolutions without groups, and MultiheadAttention (``in_proj_weight`` and, through PEFT's
    wrapper, ``out_proj.weight``). Raises :class:`AdapterError` when names or shapes do not fit the model.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
    for layer in _layers(files, model):
        yield layer.parameter, layer.delta()


def effective_weights(adapter: Path | str | AdapterFiles, model: nn.Module) -> dict[str, torch.Tensor]:
    """What :func:`merge` yields, all at once, by name."""
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
    return {changed.name: changed.weight for changed in merge(files, model)}


def merge(files: AdapterFiles, model: nn.Module) -> Iterator[ChangedWeight]:
    """``W + s B A`` of each parameter that really differs from the model's. One at a time: what is done with it at once
    finds it in the processor's cache.

    W is the model's own, or the one that the adapter replaces it with.
    Raises :class:`AdapterError` also when the sum overflows, or when a whole weight does not fit the model.
    """
    parameters = dict(model.named_parameters())
    whole = whole_weights(files)
    for name, tensor in whole.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = list(tensor.shape)
            raise AdapterError(f"Adapter {files.name}: the base has no parameter {name} {shape}.", _OTHER_BASE)

    def differs(name: str, merged: torch.Tensor, weight: torch.Tensor) -> bool:
        breathe()
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
    """LoRA of one parameter of a model."""

    files: AdapterFiles
    name: str
    parameter: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float
    weight: torch.Tensor

    def delta(self) -> torch.Tensor:
        """``s B A`` in the weight's shape. Raises AdapterError where the factors do not fit it."""
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
                _OTHER_BASE,
            )
        product = b.float().reshape(out, rank) @ a.float().reshape(rank, inner)
        return product.mul_(self.scale).reshape(weight.shape)

    def digest(self) -> str:
        """The same for the same product, however its scale is divided between the factors and the configuration, and
        whatever rank it is filled up to."""
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
                f"Adapter {files.name}: the base has no layer {plain_name!r} that takes LoRA.", _OTHER_BASE
            )
        parameter = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        if module_name.endswith(INNER_OUT_PROJ):
            scale *= OUT_PROJ_TIMES
        yield _Layer(files, plain_name, f"{plain_name}.{parameter}", a, b, scale, getattr(module, parameter))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are. In one pass that writes nothing: ``isfinite`` makes a tensor of truth values."""
    return tensor.numel() == 0 or all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


INNER_OUT_PROJ = ".base_layer.out_proj"
OUT_PROJ_TIMES = 2.0
"""PEFT 0.21 adds the delta of a MultiheadAttention's out_proj twice: its wrapper merges it, and then lets the layer
merge itself (``MultiheadAttention.merge``), in training and in ``merge_and_unload`` alike. What was trained must be
what is served, so the factor is part of the format; tests compare with PEFT and fail when PEFT changes."""

_AGAIN = "Fetch or train the adapter again; an adapter directory is never edited."
_SAVE = "Save it as float32, float16 or bfloat16."
_OTHER_BASE = "It was trained for another base; start the server with that one."


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    # The out_proj inside PEFT's wrapper has rank and alpha of its MultiheadAttention.
    owner = module.removesuffix(INNER_OUT_PROJ)
    declared = _by_pattern(config["rank_pattern"] or {}, owner, config["r"])
    if declared != rank or not 1 <= rank <= MAX_RANK:
        raise AdapterError(
            f"The adapter's configuration says rank {str(declared)[:40]} for {module}, its tensors have {rank}; "
            f"1 to {MAX_RANK} is served.",
            _AGAIN,
        )
    alpha = _by_pattern(config["alpha_pattern"] or {}, owner, config["lora_alpha"])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
        raise AdapterError(
            f"The adapter's configuration has the alpha {str(alpha)[:40]} for {module}, which is no finite number.",
            _AGAIN,
        )
    return alpha / rank**0.5 if config["use_rslora"] else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule for per-layer ranks and alphas, for plain names: the first key that the layer's name ends in.

    PEFT takes the keys as regular expressions; one from outside could run for ever, so only names are accepted.
    """
    for key, value in patterns.items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not _PLAIN.fullmatch(name):
            raise AdapterError(
                f"The adapter's configuration selects layers by {key!r}, which is no plain name.",
                "Write rank_pattern and alpha_pattern with module names.",
            )
        if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
            return value
    return default


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 1 MiB. Raises :class:`AdapterError`."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it is larger than 1 MiB")
        value = json.loads(path.read_text(), parse_constant=_no_number)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} is no adapter directory: {path.name} is missing.", _AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}.", _AGAIN) from error
    return value


def _no_number(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        hint = f" (there is {others[0]}: pickle files are never read)" if others else ""
        raise AdapterError(
            f"{path.parent} is no adapter directory: {path.name} is missing{hint}.",
            "Save the adapter with safe_serialization=True." if others else _AGAIN,
        )
    if path.stat().st_size > MAX_BYTES:
        raise AdapterError(f"{path} is larger than {MAX_BYTES >> 30} GiB.", "That is no LoRA adapter.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is no safetensors file, or was cut short: {error}.", _AGAIN) from error
    if not tensors:
        raise AdapterError(f"{path} holds no tensors.", _AGAIN)
    return tensors
