"""Registering any Hugging Face VLM as a base: a folder, or a hub name.

    add_vlm(home, "mine", Path("/models/mine"))
    add_vlm(home, "smol", "hf-hub:HuggingFaceTB/SmolVLM-256M-Instruct")

Only safetensors are read, and no code that comes with a model is run. What comes from a hub is fetched once, here; a
registered base needs no network.
"""

from __future__ import annotations

from pathlib import Path

from core.errors import BaseModelError
from core.progress import step
from serving.engines.vlm.vlm_base import VlmBase, save_vlm_base

HUB = "hf-hub:"
KEPT = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What is fetched of a hub repository; no pickled weights, no code."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def add_vlm(home: Path | str, name: str, source: Path | str) -> VlmBase:
    """Register a Hugging Face VLM as base ``name`` and return it; registering the same content again is fine.

    Raises :class:`BaseModelError`: no such folder or repository, pickled weights only, code of its own, weights that
    are not finite, or another base under this name.
    """
    text = str(source)
    folder = _fetch(text.removeprefix(HUB)) if text.startswith(HUB) else Path(text)
    if not folder.is_dir():
        raise BaseModelError(
            f"There is no folder {folder}.", f"Give a folder with config.json, or {HUB}NAME for a model of the hub."
        )
    if not any(folder.glob("*.safetensors")):
        pickled = next((path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))), None)
        if pickled is not None:
            raise BaseModelError(
                f"{folder} has only pickled weights ({pickled}). Pickle files can run code and are not read.",
                "Convert them where you trust them: load the model and save_pretrained(folder).",
            )
    with step(f"writing base {name}"):
        return save_vlm_base(home, name, folder, about={"model": text})


def _fetch(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with step(f"fetching {repository}"):
            return Path(snapshot_download(repository, allow_patterns=list(KEPT)))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{repository} cannot be fetched from the hub: {type(error).__name__}: {error}",
            "Check the name and the network, or download the repository and give its folder.",
        ) from error
