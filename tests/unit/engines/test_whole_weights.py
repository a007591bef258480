"""Whole weights in adapter files: norms, biases or full fine-tuning, beside LoRA or alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import AdapterError
from serving.engines.adapters import write_adapter
from serving.engines.backends import golden_pixels
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.layers import shell_of
from serving.engines.lora import effective_weights
from serving.engines.vlm.adapters import read_validated_adapter
from serving.engines.vlm.vlm_base import VlmBase

NORM = "visual.ln_post.weight"
LAYER = "visual.transformer.resblocks.0.mlp.c_fc"
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": []}


def parameters(base: ClipBase) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in base.build_model().named_parameters()}


def write(base: ClipBase, folder: Path, *names: str, **more: torch.Tensor) -> tuple[str, dict[str, torch.Tensor]]:
    """An adapter that replaces parameters by twice what they are."""
    own = parameters(base)
    new = {name: 2 * own[name] for name in names}
    tensors = {f"base_model.model.{name}": value for name, value in {**new, **more}.items()}
    return write_adapter(folder, tensors, CONFIG, base), new


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
    name = write_adapter(folder, {f"base_model.model.{key}": value}, CONFIG, base)
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
    name = write_adapter(folder, lora, CONFIG, vlm)
    assert read_validated_adapter(vlm, shapes, name, folder, 8).name == name
    both = folder.with_name("both")
    name = write_adapter(both, lora | {"base_model.model.model.text.norm.weight": torch.ones(6)}, CONFIG, vlm)
    with pytest.raises(AdapterError, match=r"replaces model\.text\.norm\.weight.*LoRA alone"):
        read_validated_adapter(vlm, shapes, name, both, 8)
