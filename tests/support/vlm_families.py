"""A small random model of each tested VLM family: the real classes and processors, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def text_config(known: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {**LLAMA, **ids(known), **more}


Made = tuple[Any, Any]
"""A processor and a model."""


def made(
    name: str, known: PreTrainedTokenizerFast, image: str, parts: Sequence[Any], config: dict[str, Any],
    processor: str = "", **options: Any,
) -> Made:  # fmt: skip
    """``image``: in the template. ``parts``: of the processor, which may have another ``processor`` name, with
    ``options``.
    """
    pictures, *others = parts
    kind = getattr(transformers, f"{processor or name}Processor")
    told = kind(pictures, known, *others, chat_template=template(image), **options)
    return told, getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**config)
    )


def smolvlm() -> Made:
    """SmolVLM: Idefics3's architecture under its own name."""
    known = tokenizer("<image>", "<fake_token_around_image>", "<global-img>")
    side = {"longest_edge": 32}
    pictures = transformers.SmolVLMImageProcessor(size=side, max_image_size=side, do_image_splitting=False)
    return made("SmolVLM", known, "<image>", [pictures, transformers.SmolVLMVideoProcessor()], {
        "image_token_id": known.convert_tokens_to_ids("<image>"), "scale_factor": 2,
        "pad_token_id": known.pad_token_id, "vision_config": VISION,
        "text_config": text_config(known, model_type="llama"),
    }, image_seq_len=4)  # fmt: skip


def qwen(
    version: str, videos: Any, vision: dict[str, Any], rope: dict[str, Any], text: dict[str, Any] | None = None,
    patch: int = 8, longest: int = 64,
) -> Made:  # fmt: skip
    """Qwen2-VL and its successors. ``videos``: the class of its video processor; ``vision``, ``text``: of its tower and
    its language model; ``longest``: about the side of a picture, in pixels."""
    tokens = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>",
              "video": "<|video_pad|>"}  # fmt: skip
    known = tokenizer(*tokens.values(), image_token=tokens["image"], video_token=tokens["video"])
    sizes = {"patch_size": patch, "size": {"shortest_edge": (longest // 2) ** 2, "longest_edge": longest**2}}
    parts = [transformers.Qwen2VLImageProcessor(**sizes), videos(**sizes)]
    return made(version, known, "<|vision_start|><|image_pad|><|vision_end|>", parts, {
        "text_config": text_config(known, **{"rope_scaling": {**rope, "mrope_section": [4, 6, 6]}, **(text or {})}),
        "vision_config": {"hidden_size": 32, "num_heads": 2, "patch_size": patch, **vision},
        **{f"{name}_token_id": known.convert_tokens_to_ids(token) for name, token in tokens.items()},
    })  # fmt: skip


def llava() -> Made:
    """LLaVA 1.5: CLIP's tower before Llama."""
    known = tokenizer("<image>", image_token="<image>")
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return made("Llava", known, "<image>", [pictures], {
        "text_config": text_config(known, model_type="llama"),
        "vision_config": {**VISION, "model_type": "clip_vision_model", "num_hidden_layers": 2},
        "image_token_index": known.convert_tokens_to_ids("<image>"), "image_seq_length": 16,
    }, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)  # fmt: skip


def pixtral() -> Made:
    """Pixtral in transformers: LLaVA with Pixtral's tower and Mistral."""
    known = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    pictures = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    return made("Llava", known, "[IMG]", [pictures], {
        "text_config": text_config(known, model_type="mistral"),
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 32},
        "image_token_index": known.convert_tokens_to_ids("[IMG]"), "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1, "image_seq_length": 1,
    }, "Pixtral", patch_size=8, spatial_merge_size=1)  # fmt: skip


def internvl() -> Made:
    named: Any = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    known, side = tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<video>", **named), {"height": 32, "width": 32}
    pictures = transformers.GotOcr2ImageProcessor(size=side, crop_to_patches=False)
    parts = [pictures, transformers.InternVLVideoProcessor(size=side)]
    return made("InternVL", known, "<IMG_CONTEXT>\n", parts, {
        "text_config": text_config(known, model_type="qwen2"),
        "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        "image_token_id": known.convert_tokens_to_ids("<IMG_CONTEXT>"), "image_seq_length": 4, "downsample_ratio": 0.5,
    }, image_seq_length=4)  # fmt: skip


def gemma3() -> Made:
    begin, end, soft = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    lines = ("\n" * length for length in range(1, 5))
    known = tokenizer(begin, end, soft, *lines, image_token=soft, boi_token=begin, eoi_token=end)
    tokens = {"image_token_index": soft, "boi_token_index": begin, "eoi_token_index": end}
    pictures = transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return made("Gemma3", known, begin, [pictures], {
        "text_config": text_config(known, sliding_window=64, query_pre_attn_scalar=32),
        "vision_config": {**VISION, "vision_use_head": False}, "mm_tokens_per_image": 4,
        **{name: known.convert_tokens_to_ids(token) for name, token in tokens.items()},
    }, image_seq_length=4)  # fmt: skip


MROPE = {"type": "mrope"}
FAMILIES: Final[dict[str, Callable[[], Made]]] = {
    "SmolVLM": smolvlm,
    "Qwen2-VL": lambda: qwen("Qwen2VL", transformers.Qwen2VLVideoProcessor, rope=MROPE, vision={
        "depth": 1, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}),
    "Qwen2.5-VL": lambda: qwen("Qwen2_5_VL", transformers.Qwen2VLVideoProcessor, rope=MROPE, vision={
        "depth": 2, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 32, "fullatt_block_indexes": [1]}),
    "Qwen3-VL": lambda: qwen("Qwen3VL", transformers.Qwen3VLVideoProcessor, vision={
        "depth": 2, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0]}, rope={"rope_type": "default", "mrope_interleaved": True}),
    "LLaVA": llava, "Pixtral": pixtral, "InternVL": internvl, "Gemma 3": gemma3,
}  # fmt: skip
"""Makers of the families; for Idefics3 see :mod:`tests.support.tiny_vlm`."""


def write_family(name: str, folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor, model = FAMILIES[name]()
        spread(model)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    if name in ("LLaVA", "Gemma 3"):
        _as_published(folder / "model.safetensors")


def spread(model: nn.Module) -> None:
    """Spread the weights, so that greedy answers differ between images and adapters."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)


def _as_published(path: Path) -> None:
    """Give the tower's weights the names of published checkpoints; vLLM reads no others."""
    tower, inner = "vision_tower.", "vision_tower.vision_model."
    save_file({key.replace(tower, inner): value for key, value in load_file(path).items()}, path,
              metadata={"format": "pt"})  # fmt: skip
