"""open_clip architectures with random weights as bases: as fast as trained ones, without downloads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from core.errors import ConfigError
from core.progress import step
from serving.engines.clip_base import ClipBase, construct, list_bases, load_base
from updater.bases.register import HUB_CONFIG, LOCAL, add_base, published_preprocess

SEED = 0


def random_base(home: Path, architecture: str) -> ClipBase:
    """The base named like ``architecture`` in ``home``; made, always with the same weights, if missing. A tokenizer
    that is only in a model hub is replaced by CLIP's, which costs a forward pass nothing. Raises ConfigError if
    open_clip has no such architecture."""
    if architecture in list_bases(home, "clip"):
        return load_base(home, architecture)
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ConfigError(
            f"there is no base {architecture!r}, and open_clip has no such architecture.",
            "Name a registered base (`ratchet base list`), or an architecture such as ViT-B-32.",
        )
    with step(f"making {architecture} with random weights"), tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), architecture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = construct(config, folder)
        weights = folder / "random.safetensors"
        save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, weights)
        if config["text_cfg"].pop("hf_tokenizer_name", None):
            source = f"{LOCAL}{folder}"
            described = {"model_cfg": config, "preprocess_cfg": published_preprocess(architecture)}
            (folder / HUB_CONFIG).write_text(json.dumps(described))
        return add_base(home, architecture, source, weights)
