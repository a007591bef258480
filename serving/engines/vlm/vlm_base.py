"""VLM bases: frozen Hugging Face checkpoints, each a self-contained directory ``home/bases/<name>``. Loading a base
downloads nothing; ``updater.bases`` registers them.

    base.json   family "vlm", digests of every file, layers that can carry LoRA
    model/      config, processor, tokenizer, chat template, safetensors weights, as written by ``save_pretrained``
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from core.digests import digest_bytes, digest_json
from core.errors import BaseModelError
from core.files import folder_next_to
from serving.engines.clip_base import DESCRIPTION, FORMAT, base_directory, load_described, move_into_place

if TYPE_CHECKING:
    from torch import nn

MODEL = "model"
FAMILY = "vlm"
_TOWERS = {
    "image": r"(?:.*\.)?(?:vision_model|vision_tower|visual(?!\.merger))",
    "connector": r"(?:.*\.)?(?:connector|multi_modal_projector|visual\.merger)",
    "text": r"(?:.*\.)?(?:text_model|language_model)",
}
"""Module names of Hugging Face's VLMs: Idefics3 and SmolVLM, LLaVA, and the Qwen-VL family."""
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj", "fc1", "fc2",
            "qkv", "proj", "linear_fc1", "linear_fc2")  # fmt: skip


@dataclass(frozen=True)
class VlmBase:
    """A registered base. Holds no weights; :meth:`build_model` or vLLM read them."""

    family: ClassVar[str] = FAMILY

    name: str
    directory: Path
    digest: str
    """64 hex digits over every file of the model."""
    architecture: str
    lora_targets: dict[str, str]
    """Regular expressions over module names (full match) for ``image``, ``connector`` and ``text``."""
    files: dict[str, str] = field(repr=False)
    about: dict[str, Any] = field(default_factory=dict)
    """Origin and scores, for display."""

    @property
    def model(self) -> Path:
        return self.directory / MODEL

    @property
    def weights_bytes(self) -> int:
        return sum((self.model / name).stat().st_size for name in self.files if name.endswith(".safetensors"))

    def build_model(self) -> nn.Module:
        """The transformers model in ``eval`` mode, float32, no gradients. Raises :class:`BaseModelError`."""
        import torch
        from transformers import AutoModelForImageTextToText

        _quiet()
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                self.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseModelError(f"Base {self.name!r} cannot be loaded from {self.model}: {error}", _AGAIN) from error
        return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

    def processor(self) -> Any:
        from transformers import AutoProcessor

        _quiet()
        try:
            return AutoProcessor.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise BaseModelError(f"Base {self.name!r}: its processor cannot be loaded: {error}", _AGAIN) from error

    def part_of(self, module: str) -> str | None:
        """``image``, ``connector`` or ``text`` for a layer that can carry LoRA, else None."""
        return next((part for part, pattern in self.lora_targets.items() if re.fullmatch(pattern, module)), None)


def load_vlm_base(home: Path | str, name: str) -> VlmBase:
    """Load the registered VLM base ``name``. Raises :class:`BaseModelError` when it is missing or not a VLM."""
    return load_described(home, name, VlmBase)


def save_vlm_base(
    home: Path | str, name: str, source: Path, *, about: dict[str, Any] | None = None, replace: bool = False
) -> VlmBase:
    """Register a Hugging Face folder as base ``name``; the copy is moved into place when complete. The same content is
    left as it is; other content needs ``replace``. Raises :class:`BaseModelError` for anything but a loadable VLM with
    safetensors weights and no custom code that answers a question about a picture."""
    import torch

    config = _check(source)
    target = base_directory(home, name)
    with folder_next_to(target) as work:
        (work / MODEL).mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix in {".json", ".safetensors", ".jinja", ".txt", ".model"}:
                shutil.copyfile(path, work / MODEL / path.name)
        files = {path.name: digest_bytes(path.read_bytes()) for path in sorted((work / MODEL).iterdir())}
        staged = VlmBase(name, work, digest_json(files), str(config["architectures"][0]), {}, files, {})
        model = staged.build_model()
        bad = next((n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise BaseModelError(f"Base {name!r}: {bad} holds values that are not finite.", "Use another checkpoint.")
        targets = find_vlm_targets(model)
        _check_family(name, model, staged.processor(), targets)
        described = {
            "format": FORMAT, "family": FAMILY, "digest": staged.digest, "architecture": staged.architecture,
            "lora_targets": targets, "files": files, "about": about or {},
        }  # fmt: skip
        (work / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n")
        move_into_place(work, target, staged.digest, replace)
    return load_vlm_base(home, name)


def find_vlm_targets(model: nn.Module) -> dict[str, str]:
    from torch import nn

    leaves: dict[str, set[str]] = {part: set() for part in _TOWERS}
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        part = next((part for part, tower in _TOWERS.items() if re.match(rf"{tower}\.", name)), None)
        if part is not None and isinstance(module, nn.Linear) and leaf in _TARGETS:
            leaves[part].add(leaf)
    return {part: rf"{_TOWERS[part]}\.(?:.*\.)?(?:{'|'.join(sorted(own))})" for part, own in leaves.items() if own}


def _quiet() -> None:
    """Silence transformers' progress bars and warnings; errors are raised anyway."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_KNOWN = "`ratchet bench families` lists families that are known to work; the chat template has to take images."
_AGAIN = "Remove the directory and register the base again."


def _check(source: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text())
        if not config.get("architectures"):
            raise ValueError("config.json names no architecture")
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{source} is no Hugging Face model: {error}.", "Give a folder with config.json."
        ) from error
    if config.get("auto_map"):
        raise BaseModelError(f"{source} needs code of its own, which is never run.", "Use a model transformers has.")
    if not any(source.glob("*.safetensors")):
        raise BaseModelError(f"{source} has no safetensors weights.", "Convert them with save_pretrained.")
    return config


def _check_family(name: str, model: nn.Module, processor: Any, targets: dict[str, str]) -> None:
    """Ask a question about a picture, as trainer and engines will. Raises :class:`BaseModelError`."""
    import numpy as np
    import torch

    from serving.engines.vlm.generation import question
    from serving.engines.vlm.prompts import inputs

    if "text" not in targets:
        raise BaseModelError(f"Base {name!r} has no layer of a language model that adapters could change.", _KNOWN)
    try:
        with torch.inference_mode():
            batch = inputs(processor, [question(np.full((32, 48, 3), 127, np.uint8), "what is this?")])
            finite = bool(torch.isfinite(model(**batch).logits[0, -1]).all())
    except Exception as error:  # an untried processor or model raises anything
        raise BaseModelError(
            f"Base {name!r} cannot be asked about a picture: {type(error).__name__}: {str(error)[:300]}", _KNOWN
        ) from error
    if not finite:
        raise BaseModelError(f"Base {name!r} answers with values that are not finite.", "Use another checkpoint.")
