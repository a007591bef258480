"""A small random model of each tested VLM family: the real classes and processors, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCABULARY: Final = 384
WORDS = ["what is this?", "is there a red car?", "yes", "no", "red", "green", "blue", "a round apple", "which colour?"]
LLAMA: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
VISION: Final[dict[str, Any]] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def template(image: str) -> str:
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer(
    *special: str, end: str = "<|im_end|>", vocabulary: int = VOCABULARY, **named: str
) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with these special tokens; ``named`` are attributes, such as image_token."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "<|im_start|>", end, *special]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    plain.train_from_iterator(WORDS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|im_start|>", eos_token=end, pad_token="<pad>",
        additional_special_tokens=list(special), extra_special_tokens=named,
    )  # fmt: skip


def ids(known: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "bos_token_id": known.bos_token_id, "eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id,
        "vocab_size": len(known),
    }  # fmt: skip


def smolvlm(folder: Path) -> Any:
    """SmolVLM: Idefics3's architecture under its own name."""
    known = tokenizer("<image>", "<fake_token_around_image>", "<global-img>")
    config = transformers.SmolVLMConfig(
        image_token_id=known.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=known.pad_token_id,
        vision_config=VISION, text_config={"model_type": "llama", **LLAMA, **ids(known)},
    )  # fmt: skip
    pictures = transformers.SmolVLMImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    transformers.SmolVLMProcessor(
        pictures, known, transformers.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=template("<image>")
    ).save_pretrained(folder)
    return transformers.SmolVLMForConditionalGeneration(config)


def qwen(folder: Path, version: str, videos: Any, vision: dict[str, Any], **rope: Any) -> Any:
    """Qwen2-VL and its successors. ``videos``: the class of its video processor; ``vision``: of its tower."""
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    known = tokenizer(*tokens, image_token=tokens[2], video_token=tokens[3])
    names = ("vision_start", "vision_end", "image", "video")
    config = getattr(transformers, f"{version}Config")(
        text_config={**LLAMA, **ids(known), "rope_scaling": {**rope, "mrope_section": [4, 6, 6]}},
        vision_config={"hidden_size": 32, "num_heads": 2, "patch_size": 8, **vision},
        **{f"{name}_token_id": known.convert_tokens_to_ids(token) for name, token in zip(names, tokens, strict=True)},
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    getattr(transformers, f"{version}Processor")(
        transformers.Qwen2VLImageProcessor(patch_size=8, size=size), known, videos(patch_size=8, size=size),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)  # fmt: skip
    return getattr(transformers, f"{version}ForConditionalGeneration")(config)


def qwen2_vl(folder: Path) -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return qwen(folder, "Qwen2VL", transformers.Qwen2VLVideoProcessor, vision, type="mrope")


def qwen2_5_vl(folder: Path) -> Any:
    vision = {"depth": 2, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 32,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return qwen(folder, "Qwen2_5_VL", transformers.Qwen2VLVideoProcessor, vision, type="mrope")


def qwen3_vl(folder: Path) -> Any:
    vision = {"depth": 2, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {"rope_type": "default", "mrope_interleaved": True}
    return qwen(folder, "Qwen3VL", transformers.Qwen3VLVideoProcessor, vision, **rope)


def llava(folder: Path) -> Any:
    """LLaVA 1.5: CLIP's tower before Llama."""
    known = tokenizer("<image>", image_token="<image>")
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **LLAMA, **ids(known)},
        vision_config={**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2},
        image_token_index=known.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        pictures, known, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template("<image>"),
    ).save_pretrained(folder)  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def pixtral(folder: Path) -> Any:
    """Pixtral in transformers: LLaVA with Pixtral's tower and Mistral."""
    known = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = transformers.LlavaConfig(
        text_config={"model_type": "mistral", **LLAMA, **ids(known)},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 32},
        image_token_index=known.convert_tokens_to_ids("[IMG]"), vision_feature_select_strategy="full",
        vision_feature_layer=-1, image_seq_length=1,
    )  # fmt: skip
    pictures = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    transformers.PixtralProcessor(
        pictures, known, patch_size=8, spatial_merge_size=1, chat_template=template("[IMG]")
    ).save_pretrained(folder)
    return transformers.LlavaForConditionalGeneration(config)


def internvl(folder: Path) -> Any:
    known = tokenizer(
        "<IMG_CONTEXT>", "<img>", "</img>", "<video>", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **LLAMA, **ids(known)},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=known.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    pictures = transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    transformers.InternVLProcessor(
        pictures, known, transformers.InternVLVideoProcessor(size={"height": 32, "width": 32}), image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\n"),
    ).save_pretrained(folder)  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def gemma3(folder: Path) -> Any:
    known = tokenizer(
        "<start_of_image>", "<end_of_image>", "<image_soft_token>", "\n", "\n\n", "\n\n\n", "\n\n\n\n",
        image_token="<image_soft_token>",
        boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**LLAMA, **ids(known), "sliding_window": 64, "query_pre_attn_scalar": 32},
        vision_config={**VISION, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_index=known.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=known.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=known.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    pictures = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    transformers.Gemma3Processor(
        pictures, known, image_seq_length=4, chat_template=template("<start_of_image>")
    ).save_pretrained(folder)
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES: Final[dict[str, Callable[[Path], Any]]] = {
    "SmolVLM": smolvlm, "Qwen2-VL": qwen2_vl, "Qwen2.5-VL": qwen2_5_vl, "Qwen3-VL": qwen3_vl, "LLaVA": llava,
    "Pixtral": pixtral, "InternVL": internvl, "Gemma 3": gemma3,
}  # fmt: skip
"""Makers of the families; for Idefics3 see :mod:`tests.support.tiny_vlm`."""


def write_family(name: str, folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = FAMILIES[name](folder)
        for parameter in model.parameters():  # spread, so that greedy answers differ between images and adapters
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if name in ("LLaVA", "Gemma 3"):
        _as_published(folder / "model.safetensors")


def _as_published(path: Path) -> None:
    """Give the tower's weights the names of published checkpoints; vLLM reads no others."""
    tensors = load_file(path)
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    save_file({key.replace(tower, inner) if tower in key else key: value for key, value in tensors.items()}, path,
              metadata={"format": "pt"})  # fmt: skip
