"""Adapters: LoRA deltas in PEFT's file format, named by their content. A directory is never rewritten and holds:

    adapter_model.safetensors   PEFT's tensors: <module>.lora_A.weight [r, in], <module>.lora_B.weight [out, r];
                                whole parameters where low rank does not apply (norms, biases, full weights)
    adapter_config.json         PEFT's configuration, in canonical order
    ratchet.json                {"format", "family", "name", "base", "base_digest"}
    heads.safetensors           optional classifiers over its image space, see serving.engines.heads

The name is ``clip-`` or ``vlm-`` and 12 hex digits of SHA-256 over tensors, configuration, base digest and heads.
Directories are untrusted: anything wrong raises :class:`core.errors.AdapterError`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from core.digests import digest12, digest_bytes, digest_json, digest_tensors
from core.errors import AdapterError
from core.files import folder_next_to
from serving.engines.clip_base import ClipBase
from serving.engines.heads import Head, heads_digest, read_heads, write_heads
from serving.engines.vlm.vlm_base import VlmBase

FORMAT = 1
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ABOUT = "ratchet.json"
NO_HEADS: Mapping[str, Head] = {}
MAX_RANK = 1024
MAX_BYTES = 4 << 30
"""Far above any LoRA of a CLIP; keeps a wrong file from filling the memory."""

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
"""Fields of a PEFT configuration that affect the tensors' meaning, with PEFT's defaults."""
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config", "kasa_config",
    "arrow_config", "monteclora_config",
)  # fmt: skip
PREFIX = "base_model.model."
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class AdapterFiles:
    """The content of an adapter directory, after the checks that need no model."""

    name: str
    family: str
    base_digest: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base_name: str = ""
    """Name of its base where it was made."""
    heads: Mapping[str, Head] = field(default_factory=dict)

    def check_base(self, base: ClipBase | VlmBase) -> None:
        """Raise :class:`AdapterError` when it belongs to another base."""
        if self.base_digest != base.digest:
            raise AdapterError(
                f"Adapter {self.name} belongs to the base {self.base_name[:64]!r} ({digest12(self.base_digest)}), "
                f"and this one is {base.name!r} ({digest12(base.digest)}).",
                "Start with that base, or learn on this one what was learned: `ratchet base upgrade`.",
            )


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that matter, plain and ordered, so that equal adapters have equal names. Raises :class:`AdapterError`
    for LoRA variants that are not merged as ``W + s B A``."""
    on = [key for key in _UNSUPPORTED if config.get(key)]
    kind = getattr(config.get("peft_type", "LORA"), "value", config.get("peft_type", "LORA"))
    if on or kind != "LORA" or config.get("bias", "none") != "none":
        what = on[0] if on else ("bias" if kind == "LORA" else f"peft_type={kind}")
        raise AdapterError(f"The adapter uses {what}, which is not served.", "Train a plain LoRA adapter.")
    plain = {key: config.get(key, default) for key, default in _MEANINGFUL.items()}
    plain["peft_type"] = "LORA"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(plain[key] or {}, dict):
            raise AdapterError(f"The adapter's configuration: {key} is not an object.", AGAIN)
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
    what = [digest_tensors(tensors), digest_json(canonical_config(config)), base_digest]
    what += [heads_digest(heads)] if heads else []
    return f"{family}-{digest12(digest_bytes(*(part.encode() for part in what)))}"


def adapter_name(directory: Path | str) -> str:
    """The name by content of a directory, ``clip-<digest12>``. Checks everything except the fit to a base."""
    return read_adapter(directory).name


def write_adapter(
    directory: Path | str,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    base: ClipBase | VlmBase,
    heads: Mapping[str, Head] = NO_HEADS,
) -> str:
    """Write an adapter directory in one step and return its name; an equal existing one is left alone. ``tensors`` and
    ``config`` as made by PEFT (``get_peft_model_state_dict``, ``LoraConfig.to_dict()``)."""
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
    with folder_next_to(target) as work:
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
            # Another process was faster: fine if it is the same adapter.
            if not target.exists() or adapter_name(target) != name:
                raise
    return name


def read_adapter(directory: Path | str) -> AdapterFiles:
    """Read an adapter directory and check its files against its name. Raises :class:`AdapterError` for files that are
    missing, truncated, changed, not safetensors or not finite."""
    path = Path(directory)
    about, config = read_json(path / ABOUT), read_json(path / CONFIG)
    tensors = _read_tensors(path / WEIGHTS)
    try:
        family, base_digest, claimed = (str(about[key]) for key in ("family", "base_digest", "name"))
    except KeyError as error:
        raise AdapterError(f"{path / ABOUT} has no field {error}.", AGAIN) from error
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
            f"Adapter {claimed}: its files have the digest of {name}; they are damaged or were changed.", AGAIN
        )
    return AdapterFiles(name, family, base_digest, canonical_config(config), tensors, str(about.get("base", "")), heads)


def read_adapter_of(base: ClipBase | VlmBase, name: str, directory: Path | str) -> AdapterFiles:
    """Read adapter ``name`` of ``base``. Raises :class:`AdapterError` for another one, damage, or another base."""
    files = read_adapter(directory)
    if files.name != name:
        raise AdapterError(
            f"{directory} holds {files.name}, not {name}.", "Fetch the adapter again under its own name."
        )
    files.check_base(base)
    return files


def check_dim(files: AdapterFiles, dim: int) -> None:
    """Raise :class:`AdapterError` when a head has another dimension than the base."""
    for name, head in files.heads.items():
        if head.means.shape[1] != dim:
            raise AdapterError(f"Adapter {files.name}: head {name} is of {head.means.shape[1]} dimensions.", AGAIN)


AGAIN = "Fetch or train the adapter again; an adapter directory is never edited."
_SAVE = "Save it as float32, float16 or bfloat16."


def is_finite(tensor: torch.Tensor) -> bool:
    """True if all values are finite. One pass without the boolean tensor that ``isfinite`` makes."""
    return tensor.numel() == 0 or all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB. Raises :class:`AdapterError`."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it is larger than 1 MiB")
        value = json.loads(path.read_text(), parse_constant=_no_number)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} is not an adapter directory: {path.name} is missing.", AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read: {error}.", AGAIN) from error
    return value


def _no_number(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        hint = f" (there is {others[0]}: pickle files are never read)" if others else ""
        raise AdapterError(
            f"{path.parent} is not an adapter directory: {path.name} is missing{hint}.",
            "Save the adapter with safe_serialization=True." if others else AGAIN,
        )
    if path.stat().st_size > MAX_BYTES:
        raise AdapterError(f"{path} is larger than {MAX_BYTES >> 30} GiB.", "That is not a LoRA adapter.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a safetensors file, or was cut short: {error}.", AGAIN) from error
    if not tensors:
        raise AdapterError(f"{path} holds no tensors.", AGAIN)
    return tensors
