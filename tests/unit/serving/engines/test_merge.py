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
from serving.engines.vlm.adapters import read_validated_adapter
from serving.engines.vlm.vlm_base import VlmBase
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


NORM = "visual.ln_post.weight"
LAYER = "visual.transformer.resblocks.0.mlp.c_fc"
PLAIN = {"r": 2, "lora_alpha": 4, "target_modules": []}


def parameters(base: ClipBase) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in base.build_model().named_parameters()}


def write(base: ClipBase, folder: Path, *names: str, **more: torch.Tensor) -> tuple[str, dict[str, torch.Tensor]]:
    own = parameters(base)
    new = {name: 2 * own[name] for name in names}
    tensors = {f"base_model.model.{name}": value for name, value in {**new, **more}.items()}
    return write_adapter(folder, tensors, PLAIN, base), new


def test_whole_and_low_rank_changes_of_one_weight_add_up(base: ClipBase, folder: Path) -> None:
    out, inner = parameters(base)[f"{LAYER}.weight"].shape
    a, b = torch.randn(2, inner), torch.randn(out, 2)
    _, new = write(base, folder, f"{LAYER}.weight", **{f"{LAYER}.lora_A.weight": a, f"{LAYER}.lora_B.weight": b})
    changed = effective_weights(folder, base.build_model())
    torch.testing.assert_close(changed[f"{LAYER}.weight"], new[f"{LAYER}.weight"] + 2 * b @ a)


def test_the_engine_serves_them(base: ClipBase, folder: Path) -> None:
    name, new = write(base, folder, "visual.ln_pre.weight", "text_projection")
    engine = ClipEngine(base, device="cpu")
    engine.load(name, folder)
    pixels = golden_pixels(base.preprocess.size)
    changed = shell_of(base.build_model(), new)
    with torch.inference_mode():
        images = changed.encode_image(base.preprocess.normalise(pixels)).numpy()
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    np.testing.assert_allclose(engine.encode_images(pixels, name), images, atol=1e-5)
    assert np.abs(engine.encode_images(pixels) - images).max() > 1e-3


@pytest.mark.parametrize(
    ("touched", "image", "text"),
    [
        ([NORM], True, False),
        (["visual.proj"], True, False),
        (["text_projection"], False, True),
        (["positional_embedding", "visual.class_embedding"], True, True),
        (["logit_scale"], False, False),
        (["ln_final.bias"], False, False),  # it is 0, and twice that is no change
    ],
)
def test_only_a_touched_tower_has_another_space(
    base: ClipBase, folder: Path, touched: list[str], image: bool, text: bool
) -> None:
    name, _ = write(base, folder, *touched)
    spaces = ClipEngine(base, device="cpu").load(name, folder)
    assert (spaces.image != base.spaces.image) == image
    assert (spaces.text != base.spaces.text) == text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("visual.nowhere.weight", torch.ones(64)),
        (NORM, torch.ones(65)),
        (NORM, torch.ones(1)),  # would broadcast
        ("visual.transformer.resblocks.0.mlp.c_fc", torch.ones(64)),
    ],
)
def test_another_name_or_shape_is_refused_by_name(base: ClipBase, folder: Path, key: str, value: torch.Tensor) -> None:
    name = write_adapter(folder, {f"base_model.model.{key}": value}, PLAIN, base)
    with pytest.raises(AdapterError, match=rf"no parameter {key} \[{len(value)}\]"):
        ClipEngine(base, device="cpu").load(name, folder)


def test_a_sum_that_overflows_is_refused(base: ClipBase, folder: Path) -> None:
    out, inner = parameters(base)[f"{LAYER}.weight"].shape
    values = {
        f"{LAYER}.weight": torch.full((out, inner), 3e38),
        f"{LAYER}.lora_A.weight": torch.full((2, inner), 1e19),
        f"{LAYER}.lora_B.weight": torch.full((out, 2), 1e19),
    }
    write(base, folder, **values)
    with pytest.raises(AdapterError, match="overflow"):
        effective_weights(folder, base.build_model())


def test_a_vlm_refuses_them_and_takes_lora(folder: Path) -> None:
    vlm = VlmBase("vlm", folder, "0" * 64, "None", lora_targets={}, files={})
    lora = {
        "base_model.model.model.text.q_proj.lora_A.weight": torch.ones(2, 6),
        "base_model.model.model.text.q_proj.lora_B.weight": torch.ones(4, 2),
    }
    shapes = {"model.text.q_proj": (4, 6)}
    name = write_adapter(folder, lora, PLAIN, vlm)
    assert read_validated_adapter(vlm, shapes, name, folder, 8).name == name
    both = folder.with_name("both")
    name = write_adapter(both, lora | {"base_model.model.model.text.norm.weight": torch.ones(6)}, PLAIN, vlm)
    with pytest.raises(AdapterError, match=r"replaces model\.text\.norm\.weight.*LoRA alone"):
        read_validated_adapter(vlm, shapes, name, both, 8)
