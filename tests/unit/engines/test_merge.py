"""The merged weights are those of PEFT, on every kind of layer that may carry LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.model
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from core.errors import AdapterError
from serving.engines.adapters import AdapterFiles, canonical_config, write_adapter
from serving.engines.backends import golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase, save_base
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from serving.engines.preprocess import Preprocess
from tests.support.tiny import CONFIG

TEXTS = ["a cat", "two dogs on the beach at night"]
RESNET: dict[str, Any] = CONFIG | {
    "vision_cfg": {"image_size": 32, "timm_model_name": "tf_efficientnet_lite0", "timm_proj": "linear"}
}


def _with_random_lora(base: ClipBase, seed: int = 0, **config: Any) -> tuple[nn.Module, LoraConfig]:
    torch.manual_seed(seed)
    lora = LoraConfig(**({"r": 4, "lora_alpha": 6, "init_lora_weights": False} | config))
    wrapped = get_peft_model(base.build_model(), lora).eval()
    return wrapped, lora


def _raw(model: nn.Module, base: ClipBase) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        pixels = base.preprocess.normalise(golden_pixels(base.preprocess.size))
        tokens = base.tokenizer()(TEXTS)
        return model.encode_image(pixels).numpy(), model.encode_text(tokens).numpy()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["attn", "c_fc", "c_proj"]},
        {"target_modules": ["attn"], "use_rslora": True},
        {"target_modules": ["c_fc", "c_proj"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_proj": 9}},
        {"target_modules": ["attn", "c_fc"], "rank_pattern": {"visual.transformer.resblocks.0.attn": 3}},
    ],
    ids=["all layers", "attention, rslora", "ranks and alphas", "one attention"],
)
def test_transformer_layers_merge_as_in_peft(base: ClipBase, folder: Path, config: dict[str, Any]) -> None:
    wrapped, lora = _with_random_lora(base, **config)
    write_adapter(folder, get_peft_model_state_dict(wrapped), lora.to_dict(), base)
    model = base.build_model()
    merged = shell_of(model, effective_weights(folder, model))
    theirs, ours, plain = _raw(wrapped.base_model.model, base), _raw(merged, base), _raw(model, base)
    for tower in (0, 1):
        np.testing.assert_allclose(ours[tower], theirs[tower], rtol=0, atol=1e-5)
        assert np.abs(plain[tower] - theirs[tower]).max() > 1e-2


def test_attention_merges_as_in_pefts_own_merge(base: ClipBase, folder: Path) -> None:
    """``merge_and_unload`` agrees with PEFT's forward pass about the delta of out_proj, and so do we with both."""
    wrapped, lora = _with_random_lora(base, target_modules=["attn"])
    write_adapter(folder, get_peft_model_state_dict(wrapped), lora.to_dict(), base)
    ours = effective_weights(folder, base.build_model())
    merged = dict(wrapped.merge_and_unload().named_parameters())
    assert any(name.endswith("out_proj.weight") for name in ours)
    for name, weight in ours.items():
        theirs = merged.get(name)
        assert theirs is not None, name
        torch.testing.assert_close(weight, theirs, rtol=0, atol=1e-5)


def test_pointwise_convolutions_and_projections_merge_as_in_peft(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = open_clip.model.CLIP(**copy.deepcopy(RESNET)).eval()
    conv = save_base(tmp_path, "conv", model, RESNET, Preprocess(size=32), {"kind": "simple"})
    wrapped, lora = _with_random_lora(conv, target_modules=r".*(conv_pw|conv_pwl)|visual\.head\.proj")
    name = write_adapter(tmp_path / "a", get_peft_model_state_dict(wrapped), lora.to_dict(), conv)
    engine = ClipEngine(conv, device="cpu")
    engine.load(name, tmp_path / "a")
    images = golden_pixels(32)
    theirs = _raw(wrapped.base_model.model, conv)[0]
    theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(engine.encode_images(images, name), theirs, atol=1e-5)
    assert np.abs(engine.encode_images(images) - theirs).max() > 1e-3


def test_single_layers_have_the_delta_that_peft_computes() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(6, 5, 1), nn.Linear(4, 3))
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False))
    config = canonical_config(wrapped.peft_config["default"].to_dict())
    files = AdapterFiles("clip-0", "clip", "", config, get_peft_model_state_dict(wrapped))
    plain = nn.Sequential(nn.Conv2d(6, 5, 1), nn.Linear(4, 3))
    ours = effective_weights(files, plain)
    for number, layer in enumerate(wrapped.base_model.model):
        delta = ours[f"{number}.weight"] - plain[number].weight.detach()
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-4)


def test_lora_targets_reach_the_layers_that_can_learn(base: ClipBase) -> None:
    for tower, other in (("image", "text"), ("text", "image")):
        wrapped, _ = _with_random_lora(base, target_modules=base.lora_targets[tower])
        names = [n.removeprefix("base_model.model.") for n, p in wrapped.named_parameters() if p.requires_grad]
        assert names, tower
        assert {n.startswith("visual.") for n in names} == {tower == "image"}, other
        kinds = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in names}
        assert kinds == {"attn", "out_proj", "c_fc", "c_proj"}


@pytest.mark.parametrize("field", ["use_dora", "lora_bias", "target_parameters", "modules_to_save"])
def test_other_kinds_of_adapters_are_refused_by_name(base: ClipBase, folder: Path, field: str) -> None:
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["attn"], field: True}
    with pytest.raises(AdapterError, match=field):
        write_adapter(folder, {"x.lora_A.weight": torch.ones(4, 4)}, config, base)
