"""The quick start as its page tells it, from nothing to a verdict on a base other than the shipped one."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from core.addresses import free_port
from core.ledger import Ledger
from core.loading import load_settings
from serving.engines.clip_base import list_bases
from serving.engines.preprocess import OPENAI_MEAN, OPENAI_STD
from tests.support.pages import ROOT, Page
from tests.support.shapes import shapes
from tests.support.tiny import CONFIG

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]

PAGE = Page(ROOT / "docs" / "quickstart.md")
PATTERNS = ("plain", "upright stripes", "level stripes", "slanted stripes", "checks", "dots", "a frame", "a cross")
SIDE = 32
STEPS, BATCH, DRAWN = 400, 64, 1536


def page_script() -> str:
    return "\n".join(["set -euxo pipefail", *(block.text for block in PAGE.blocks if block.language == "bash")])


@contextmanager
def running(script: str, folder: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    shell = subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield shell
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGTERM)  # `ratchet up` stops its parts
        shell.wait(60)


def test_the_page_leads_from_nothing_to_a_verdict_and_back(tmp_path: Path) -> None:
    folder, mine = tmp_path / "empty", tmp_path / "mine"
    folder.mkdir()
    weights = own_model(mine / "tiny-vit", mine / "known", each=400 // len(PATTERNS))
    shapes(mine / "new", copies=58)
    ports = {f"RATCHET_{name}": str(free_port()) for name in (
        "SERVE__PORT", "CONSOLE__PORT", "INGEST__METRICS_PORT", "MAINTAIN__METRICS_PORT", "UPDATER__METRICS_PORT",
    )}  # fmt: skip
    environ = {
        **os.environ, **ports,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "120",
        "RATCHET_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}", "RATCHET_INGEST__SPLIT_KEY": "quickstart",
        "RATCHET_UPDATER__THREADS": "1", "RATCHET_UPDATER__NICE": "0",
        "RATCHET_BUDGET__GFLOPS_PER_UPDATE": "110",  # some 200 steps
        "RATCHET_GATE__TRUSTED_SOURCES": "['*']",  # the tiny base knows nothing of the new shapes
        "MODEL": str(mine / "tiny-vit"), "WEIGHTS": str(weights), "KNOWN": str(mine / "known"),
        "NEW": str(mine / "new"), "SERVER": f"http://127.0.0.1:{ports['RATCHET_SERVE__PORT']}",
    }  # fmt: skip
    with running(page_script(), folder, environ) as shell:
        output, _ = shell.communicate()
    assert shell.returncode == 0, output[-6000:]
    print(output)

    settings = load_settings(folder / "ratchet.yaml", {"home": folder / ".ratchet"}, environ={})
    assert settings.base.clip == "tiny-vit"
    assert list_bases(settings.home) == ["tiny-vit"]
    assert set(yaml.safe_load((folder / "ratchet.yaml").read_text())) == {"base", "gate", "updater"}
    assert re.search(r"known-classification\W+240\W.*yes", output), "400 pictures are enough"
    ledger = Ledger.open(settings.ledger)
    (verdict,) = ledger.verdicts(5)
    assert verdict.outcome == "passed", verdict.summary
    adapters = [row.clip for row in ledger.releases(5)]
    assert adapters == [None, verdict.adapter, None]
    assert (settings.home / "gate" / verdict.update_id / "report.html").is_file()
    assert len(json.loads((folder / "base.json").read_text())["data"][0]["embedding"]) == 32
    found = json.loads((folder / "found.json").read_text())["data"]
    assert sum("red" in hit["text"] for hit in found) >= 2  # its own model knew only grey patterns


def own_model(folder: Path, known: Path, each: int) -> Path:
    """Write a ViT with two layers in open_clip's format, trained to name grey patterns, and in ``known`` ``each`` other
    pictures of every pattern. Returns the file of its weights, next to ``folder``, which has the configuration.
    """
    random = np.random.default_rng(0)
    for pattern in PATTERNS:
        (known / pattern.replace(" ", "_")).mkdir(parents=True)
        for number in range(each):
            Image.fromarray(_draw(pattern, random)).save(known / pattern.replace(" ", "_") / f"{number:03}.png")
    folder.mkdir(parents=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {"size": SIDE}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = folder.with_suffix(".safetensors")
    save_file(_trained(random), weights)
    return weights


def _trained(random: np.random.Generator) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
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
    """[32, 32, 3]: light on dark, with random shift, contrast and noise."""
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
