"""The shipped VLM: an Idefics3 (SmolVLM's architecture) of 4 million parameters. The 64 patches of a 64 px image are
joined 2 x 2 to 16 image tokens; attention heads have 64 dimensions, as vLLM's CPU kernels require."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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

SIDE, PATCH, JOINED = 64, 8, 2
"""Pixels per side of an image and of a patch, and patches per side joined by the connector."""
VOCABULARY = 1024
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 3}
TEXT = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024}  # fmt: skip
PAD, START, END = "<pad>", "<|im_start|>", "<end_of_utterance>"
SPECIAL = (PAD, START, END, "<image>", "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""SmolVLM's template without the space before answers, so that an answer has the same tokens everywhere."""


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the words in `texts`; other texts take more tokens."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token=START, eos_token=END, pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    pictures = Idefics3ImageProcessor(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    seats = (SIDE // PATCH // JOINED) ** 2
    return Idefics3Processor(pictures, tokenizer, image_seq_len=seats, chat_template=TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model with random weights from torch's global generator."""
    ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL}
    ends = {"pad_token_id": ids[PAD], "bos_token_id": ids[START], "eos_token_id": ids[END]}
    config = Idefics3Config(
        image_token_id=ids["<image>"], scale_factor=JOINED, tie_word_embeddings=True, pad_token_id=ids[PAD],
        vision_config={**VISION, "image_size": SIDE, "patch_size": PATCH},
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "tie_word_embeddings": True, **ends},
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    return model


def write_model(model: Any, processor: Any, folder: Path) -> Path:
    """Save both as a Hugging Face folder, weights in float16."""
    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder
