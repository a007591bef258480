"""An open_clip CLIP written as a Hugging Face ``CLIPModel`` directory, with the same vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizerFast

from core.errors import BaseModelError
from serving.engines.clip_base import ClipBase

START: Final = 49406
END: Final = 49407
START_TOKEN: Final = "<|startoftext|>"  # noqa: S105  a token of text
END_TOKEN: Final = "<|endoftext|>"  # noqa: S105
HEAD_WIDTH: Final = 64
"""Default of open_clip's vision towers."""
_WHOLE: Final = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED: Final = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_BLOCKS: Final = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_IN_BLOCK: Final = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def write_hf_clip(base: ClipBase, folder: Path) -> Path:
    """Write weights, configuration, tokenizer and preprocessing; returns ``folder``. Raises BaseModelError if the base
    is not a CLIP of two transformers with OpenAI's tokenizer, which is all that Hugging Face's class supports.
    """
    model = base.build_model()
    config = hf_config(base.model_cfg, model)
    if base.tokenizer_cfg["kind"] != "simple" or base.preprocess.resize_mode != "shortest":
        raise BaseModelError(f"base {base.name!r} has another tokenizer or preprocessing than CLIPModel.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf_weights(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, base.context_length)
    _write_preprocessing(base, folder)
    return folder


def hf_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``CLIPModel``'s state from ``open_clip.model.CLIP``'s. Raises BaseModelError for a tensor that it lacks."""
    weights: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in _WHOLE:
            weights[_WHOLE[name]] = value
        elif name in _TRANSPOSED:
            weights[_TRANSPOSED[name]] = value.T
        elif name != "attn_mask":
            weights |= _block_weights(name, value)
    return {name: value.contiguous().clone() for name, value in weights.items()}


def _block_weights(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    for prefix, target in _BLOCKS.items():
        if not name.startswith(prefix):
            continue
        number, _, inner = name.removeprefix(prefix).partition(".")
        layer, kind = f"{target}{number}.", inner.rpartition(".")[2]
        if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
            suffix = inner.removeprefix("attn.in_proj_")
            rows = zip("qkv", value.chunk(3), strict=True)
            return {f"{layer}self_attn.{letter}_proj.{suffix}": part for letter, part in rows}
        module = inner.rpartition(".")[0]
        if module in _IN_BLOCK:
            return {f"{layer}{_IN_BLOCK[module]}.{kind}": value}
    raise BaseModelError(f"CLIPModel has no place for {name!r}.", "Use a model of two plain transformers.")


def hf_config(model_cfg: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``CLIPConfig`` of an open_clip configuration. Raises BaseModelError when it has more than plain transformers."""
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    special = {"hf_model_name", "timm_model_name", "no_causal_mask", "pool_type"} & (vision.keys() | text.keys())
    if special or model_cfg.get("custom_text") or not isinstance(vision["layers"], int):
        raise BaseModelError(f"this architecture is no CLIPModel ({', '.join(sorted(special)) or 'custom'}).")
    activation = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    common = {"hidden_act": activation, "projection_dim": model_cfg["embed_dim"], "layer_norm_eps": 1e-5}
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": float(torch.as_tensor(model.logit_scale)), "torch_dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": vision["width"], "num_hidden_layers": vision["layers"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_attention_heads": vision["width"] // vision.get("head_width", HEAD_WIDTH),
            "image_size": vision["image_size"], "patch_size": vision["patch_size"], **common,
        },
        "text_config": {
            "model_type": "clip_text_model", "hidden_size": text["width"], "num_hidden_layers": text["layers"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_attention_heads": text["heads"], "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": START, "eos_token_id": END, "pad_token_id": END, **common,
        },
    }  # fmt: skip


def write_tokenizer(folder: Path, context_length: int) -> None:
    """OpenAI's byte-pair encoding, as open_clip ships it, in the files of ``CLIPTokenizer``, including
    ``tokenizer.json``.
    """
    tokenizer = SimpleTokenizer()
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    names = {"<start_of_text>": START_TOKEN, "<end_of_text>": END_TOKEN}
    vocabulary = {names.get(token, token): number for token, number in tokenizer.encoder.items()}
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END_TOKEN) | {"bos_token": START_TOKEN}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True,
                "errors": "replace", "add_prefix_space": False, **special}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))


def _write_preprocessing(base: ClipBase, folder: Path) -> None:
    preprocess = base.preprocess
    size = preprocess.size
    described = {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor",
        "do_resize": True, "size": {"shortest_edge": size}, "do_center_crop": True,
        "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "resample": 2 if preprocess.interpolation == "bilinear" else 3, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": list(preprocess.mean), "image_std": list(preprocess.std),
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(described, indent=1))
