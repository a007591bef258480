"""A model of one's own, as a user has it: weights that were trained elsewhere, and pictures that it knows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from serving.engines.preprocess import OPENAI_MEAN, OPENAI_STD
from tests.support.tiny import CONFIG

PATTERNS = ("plain", "upright stripes", "level stripes", "slanted stripes", "checks", "dots", "a frame", "a cross")
SIDE = 32
STEPS, BATCH, DRAWN = 400, 64, 1536


def own_model(folder: Path, known: Path, each: int, seed: int = 0) -> Path:
    """Write a ViT with two layers in open_clip's format, trained to name grey patterns, and pictures of these.

    Args:
        folder: gets ``open_clip_config.json``; the weights are beside it, in the file that is returned.
        known: gets a folder of ``each`` pictures for each pattern, none of which the model was trained on.
    """
    random = np.random.default_rng(seed)
    for pattern in PATTERNS:
        (known / pattern.replace(" ", "_")).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(_draw(pattern, random)).save(known / pattern.replace(" ", "_") / f"{number:03}.png")
    folder.mkdir(parents=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"size": SIDE}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = folder.with_suffix(".safetensors")
    save_file(_trained(random, seed), weights)
    return weights


def _trained(random: np.random.Generator, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**CONFIG)
    tokens = open_clip.get_tokenizer("ViT-B-32", context_length=16)([f"a photo of {name}." for name in PATTERNS])
    classes = torch.from_numpy(random.integers(0, len(PATTERNS), DRAWN))
    drawn = np.stack([_draw(PATTERNS[each], random) for each in classes])
    pixels = (
        torch.from_numpy((drawn / 255.0 - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)).float().permute(0, 3, 1, 2)
    )
    # The vectors of words that no name has are nine tenths of all parameters. In their order, for the last is pooled.
    words, tokens = tokens.unique(return_inverse=True)
    vocabulary = model.token_embedding
    model.token_embedding = torch.nn.Embedding(*vocabulary.weight[words].shape)
    model.token_embedding.weight.data = vocabulary.weight.data[words].clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = torch.from_numpy(random.integers(0, DRAWN, BATCH))
        image = model.encode_image(pixels[batch], normalize=True)
        text = model.encode_text(tokens, normalize=True)
        loss = functional.cross_entropy(model.logit_scale.exp() * image @ text.T, classes[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    vocabulary.weight.data[words] = model.token_embedding.weight.data
    model.token_embedding = vocabulary
    return {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}


def _draw(pattern: str, random: np.random.Generator) -> NDArray[np.uint8]:
    """[32, 32, 3]: light on dark, shifted and of another contrast each time, with noise."""
    y, x = np.mgrid[:SIDE, :SIDE] + random.integers(0, 8, (2, 1, 1))
    centred = np.abs(np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2 + random.integers(-2, 3, (2, 1, 1)))
    light = {
        "plain": np.zeros((SIDE, SIDE), bool),
        "upright stripes": x // 4 % 2 == 0,
        "level stripes": y // 4 % 2 == 0,
        "slanted stripes": (x + y) // 4 % 2 == 0,
        "checks": (x // 4 + y // 4) % 2 == 0,
        "dots": (x % 8 < 3) & (y % 8 < 3),
        "a frame": (centred.max(axis=0) > 9) & (centred.max(axis=0) < 13),
        "a cross": centred.min(axis=0) < 3,
    }[pattern]
    grey = random.integers(20, 70) + light * random.integers(80, 150) + random.normal(0, 12, (SIDE, SIDE))
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
