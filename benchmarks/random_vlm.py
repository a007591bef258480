"""A reranker's shape with random weights, as a base: as fast as a trained one, without a download."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import torch
import transformers

from core.progress import step
from serving.engines.clip_base import list_bases
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from tests.support.vlm_families import qwen
from updater.bases.register import add_vlm

RERANKER: Final = "qwen3-vl-reranker-2b"
ROPE: Final = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_theta": 5e6}
TEXT: Final = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "vocab_size": 151_936, "rope_scaling": ROPE,
}  # fmt: skip
VISION: Final = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
}  # fmt: skip
"""Of Qwen/Qwen3-VL-Reranker-2B on Hugging Face. Its tokenizer is replaced by a small one, so a text has more tokens."""
PATCH, LONGEST = 16, 448
SEED: Final = 0


def random_reranker(home: Path) -> VlmBase:
    """The base :data:`RERANKER` in ``home``; made, always with the same weights, if missing: 2.1 billion parameters in
    bfloat16, 4 GB on disk, and 13 GB of memory while it is made."""
    if RERANKER in list_bases(home, "vlm"):
        return load_vlm_base(home, RERANKER)
    home.mkdir(parents=True, exist_ok=True)
    with step(f"making {RERANKER} with random weights"), tempfile.TemporaryDirectory(dir=home) as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            torch.set_default_dtype(torch.bfloat16)
            try:
                videos = transformers.Qwen3VLVideoProcessor
                processor, model = qwen("Qwen3VL", videos, VISION, ROPE, TEXT, PATCH, LONGEST)
            finally:
                torch.set_default_dtype(torch.float32)
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
        del model
        return add_vlm(home, RERANKER, folder)
