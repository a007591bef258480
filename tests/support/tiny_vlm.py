"""A tiny random VLM (Idefics3, as SmolVLM) and random adapters for it: the real classes, in a second."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

from serving.engines.adapters import write_adapter
from serving.engines.vlm.base import VlmBase, load_vlm_base, save_vlm_base

SIDE, PATCH, SCALE = 32, 8, 2
VOCABULARY = 320
RANK = 4
SPECIAL = ("<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
WORDS = ["what is this?", "is there a red car?", "yes", "no", "red", "green", "blue", "a round apple", "which colour?"]


def tiny_vlm_base(home: Path, name: str = "tiny-vlm", seed: int = 0) -> VlmBase:
    """Text Llama 2 x 64, vision 1 x 64 at 32 px: 4 image tokens. Random weights, in ``home/bases``."""
    if (home / "bases" / name / "base.json").is_file():
        return load_vlm_base(home, name)
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), seed)
        return save_vlm_base(home, name, Path(folder), about={"source": "random weights, for tests"})


def tiny_vlm_adapter(
    base: VlmBase, directory: Path, seed: int, scale: float = 1.0, parts: tuple[str, ...] = ("text",), rank: int = RANK
) -> str:
    """Write a random LoRA adapter into the new folder ``directory``; returns its name. ``parts``: text, image, ..."""
    made = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    leaves: set[str] = set()
    for name, module in base.build_model().named_modules():
        if isinstance(module, nn.Linear) and base.part_of(name) in parts:
            out, inner = module.weight.shape
            size = scale * float(module.weight.std()) / rank**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, inner, generator=made)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank, generator=made) * size
            leaves.add(name)
    pattern = "|".join(re.escape(name) for name in sorted(leaves))
    return write_adapter(directory, tensors, {"r": rank, "lora_alpha": rank, "target_modules": f"(?:{pattern})"}, base)


def _write(folder: Path, seed: int) -> None:
    tokenizer = _tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    common = {
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<end_of_utterance>"],
    }
    config = Idefics3Config(
        image_token_id=ids["<image>"], scale_factor=SCALE, tie_word_embeddings=True, pad_token_id=ids["<pad>"],
        vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": SIDE, "patch_size": PATCH},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
                     "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                     "max_position_embeddings": 512, "tie_word_embeddings": True, **common},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
        for parameter in model.parameters():  # spread, so that greedy answers differ between images and adapters
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = ids["<end_of_utterance>"]
    model.generation_config.pad_token_id = ids["<pad>"]
    model.save_pretrained(folder)
    pictures = Idefics3ImageProcessor(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    seats = (SIDE // PATCH // SCALE) ** 2
    Idefics3Processor(pictures, tokenizer, image_seq_len=seats, chat_template=TEMPLATE).save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    plain.train_from_iterator(WORDS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<pad>",
        additional_special_tokens=["<image>", "<fake_token_around_image>", "<global-img>"],
    )  # fmt: skip
