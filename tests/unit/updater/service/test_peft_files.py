from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.errors import AdapterError
from serving.engines.adapters import adapter_name, read_adapter, write_adapter
from serving.engines.clip_base import ClipBase
from serving.engines.heads import write_heads
from serving.engines.lora import effective_weights
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.heads import random_head
from tests.support.tiny import tiny_adapter
from tests.support.tiny_vlm import tiny_vlm_adapter
from updater.adapters import read_delta
from updater.service.peft_files import convert

TARGETS = ["visual.transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.1.mlp.c_proj"]


def trained(base: ClipBase, folder: Path, **options: Any) -> nn.Module:
    """A PEFT model with random LoRA weights, saved into ``folder`` by PEFT itself."""
    torch.manual_seed(5)
    model = get_peft_model(base.build_model(), LoraConfig(**{"r": 4, "target_modules": TARGETS, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def changed(folder: Path, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **config: Any) -> Path:
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({key: value.contiguous() for key, value in tensors(load_file(weights)).items()}, weights)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
    return folder


def refused(folder: Path, base: ClipBase | VlmBase, message: str, max_rank: int = 64) -> None:
    with pytest.raises(AdapterError) as caught:
        convert(folder, base, max_rank, folder.parent / "ours")
    assert message in caught.value.message
    assert caught.value.fix
    assert not (folder.parent / "ours").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": [*TARGETS, "transformer.resblocks.0.attn"], "rank_pattern": {"0.attn": 2}},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {TARGETS[0]: 2}, "alpha_pattern": {TARGETS[1]: 5}},
        {"target_modules": "all-linear", "rank_pattern": {TARGETS[0]: 6}, "use_rslora": True},
    ],
)
def test_what_peft_trained_is_what_is_served(base: ClipBase, tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(base, tmp_path / "peft", **options)
    merged = dict(model.merge_and_unload().named_parameters())  # type: ignore[operator]
    name = convert(tmp_path / "peft", base, 64, tmp_path / "ours")
    assert name == adapter_name(tmp_path / "ours")
    weights = effective_weights(tmp_path / "ours", base.build_model())
    assert {f"{target}.weight" for target in TARGETS} <= weights.keys()
    for parameter, value in weights.items():
        torch.testing.assert_close(value, merged[parameter], rtol=0, atol=1e-6)
    read_delta(tmp_path / "ours", base)  # the trainer goes on from it
    changed(tmp_path / "peft", lambda t: {key.removeprefix("base_model.model."): value for key, value in t.items()})
    assert convert(tmp_path / "peft", base, 64, tmp_path / "two") == name, "PEFT's prefix may be missing"
    config = read_adapter(tmp_path / "ours").config
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]


def test_an_adapter_of_ours_keeps_its_name_and_heads(base: ClipBase, vlm: VlmBase, tmp_path: Path) -> None:
    name = tiny_adapter(base, tmp_path / "clip", seed=1)
    assert convert(tmp_path / "clip", base, 64, tmp_path / "clip-again") == name
    name = tiny_vlm_adapter(vlm, tmp_path / "vlm", seed=1)
    assert convert(tmp_path / "vlm", vlm, 64, tmp_path / "vlm-again") == name
    files, heads = read_adapter(tmp_path / "clip"), {"things": random_head(base.dim)}
    name = write_adapter(tmp_path / "ours", files.tensors, files.config, base, heads)
    assert convert(tmp_path / "ours", base, 16, tmp_path / "again") == name
    assert read_adapter(tmp_path / "again").heads.keys() == heads.keys()
    write_heads(tmp_path / "vlm", heads)
    with pytest.raises(AdapterError, match="has heads"):
        convert(tmp_path / "vlm", vlm, 16, tmp_path / "none")


def with_value(value: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    next(iter(tensors.values()))[0, 0] = value
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["visual.proj"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"corda_config": {"x": 1}}, "corda_config is set"),
        ({"a_field_of_tomorrow": True}, "a_field_of_tomorrow is set"),
        ({"r": "four"}, "r is 'four'"),
        ({"r": 8}, "says rank 8"),
        ({"use_rslora": "yes"}, "use_rslora is neither"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "not a plain name"),
        ({"lora_alpha": 1e300}, "alpha"),
        ({"tensors": partial(with_value, math.nan)}, "not finite"),
        ({"tensors": partial(with_value, math.inf)}, "not finite"),
        ({"tensors": lambda t: {k: v.to(torch.int8) for k, v in t.items()}}, "I8"),
        ({"tensors": lambda t: {k: v[:, :3] if "lora_A" in k else v for k, v in t.items()}}, "does not fit"),
        ({"tensors": lambda t: {k: v for k, v in t.items() if "lora_B" not in k}}, "only one of"),
        ({"tensors": lambda t: {k.replace("mlp.c_fc", "fc1"): v for k, v in t.items()}}, "resblocks.0.fc1"),
        ({"tensors": lambda t: {f"{k}.{n}": v.clone() for k, v in t.items() for n in range(6)}}, "and 26 more"),
        ({"tensors": lambda t: t | {"base_model.model.visual.made_up": torch.ones(3)}}, "visual.made_up"),
        ({"tensors": lambda t: t | {"base_model.model.visual.ln_post.weight": torch.ones(3)}}, "does not fit"),
        ({"tensors": lambda t: t | {k.removeprefix("base_model.model."): v.clone() for k, v in t.items()}}, "twice"),
    ],
)
def test_unserved_fields_and_tensors_that_do_not_fit_are_refused(
    base: ClipBase, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    trained(base, tmp_path / "peft")
    refused(changed(tmp_path / "peft", **change), base, message)


def test_a_higher_rank_and_whole_parameters_of_a_vlm_are_refused(base: ClipBase, vlm: VlmBase, tmp_path: Path) -> None:
    trained(base, tmp_path / "peft")
    refused(tmp_path / "peft", base, "rank 4; 3 is served", 3)
    tiny_vlm_adapter(vlm, tmp_path / "vlm", seed=1, rank=4)
    refused(tmp_path / "vlm", vlm, "rank 4; 2 is served", 2)
    name, parameter = next(iter(vlm.build_model().named_parameters()))
    changed(tmp_path / "vlm", lambda t: t | {f"base_model.model.{name}": parameter.detach().clone()})
    refused(tmp_path / "vlm", vlm, "no parameter")


def test_damaged_pickled_and_too_large_files_are_refused(base: ClipBase, tmp_path: Path) -> None:
    trained(base, tmp_path / "peft")
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    refused(tmp_path / "peft", base, "cut short")
    with weights.open("r+b") as file:
        file.truncate((4 << 30) + 1)  # a hole: it takes no space
    refused(tmp_path / "peft", base, "larger than 4 GiB")
    weights.rename(tmp_path / "peft" / "adapter_model.bin")
    refused(tmp_path / "peft", base, "pickle files are never read")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    refused(tmp_path / "peft", base, "adapter_config.json is missing")


def test_no_regular_expression_from_outside_is_kept(base: ClipBase, tmp_path: Path) -> None:
    trained(base, tmp_path / "peft", target_modules=r".*\.0\.mlp\.c_fc")
    convert(tmp_path / "peft", base, 64, tmp_path / "ours")
    kept = read_adapter(tmp_path / "ours").config["target_modules"]
    assert sorted(kept) == ["transformer.resblocks.0.mlp.c_fc", "visual.transformer.resblocks.0.mlp.c_fc"]
