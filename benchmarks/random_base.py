"""open_clip architectures with random weights as bases: as fast as trained ones, without downloads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from core.errors import ConfigError
from core.progress import step
from serving.engines.clip_base import ClipBase, construct, list_bases, load_base
from updater.bases.register import add_base

SEED = 0


def random_base(home: Path, architecture: str) -> ClipBase:
    """The base named like ``architecture`` in ``home``; made, always with the same weights, if missing. Raises
    ConfigError if open_clip has no such architecture.
    """
    if architecture in list_bases(home, "clip"):
        return load_base(home, architecture)
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ConfigError(
            f"there is no base {architecture!r}, and open_clip has no such architecture.",
            "Name a registered base (`ratchet base list`), or an architecture such as ViT-B-32.",
        )
    with step(f"making {architecture} with random weights"), tempfile.TemporaryDirectory() as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = construct(config, Path(folder))
        weights = Path(folder) / "random.safetensors"
        save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, weights)
        return add_base(home, architecture, architecture, weights)
