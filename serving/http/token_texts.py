"""What the tokens of a VLM read as, for log-probabilities. Needs the tokenizer's file only, no model."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

FILE = "tokenizer.json"
WORD_START = "\u2581"
"""SentencePiece's mark of a space before a word, which decoding a token on its own drops."""
KEPT = 65_536


def token_texts(model: Path | None) -> Callable[[int], str]:
    """A function from token to text. Half of a character reads as U+FFFD.

    Args:
        model: a Hugging Face folder; without a ``tokenizer.json`` (or without a folder) a token is ``token_id:7``.
    """
    path = model / FILE if model is not None else None
    if path is None or not path.is_file():
        return "token_id:{}".format
    tokenizer = Tokenizer.from_file(str(path))

    @lru_cache(KEPT)
    def text_of(token: int) -> str:
        raw: str | None = tokenizer.id_to_token(token)
        if raw is None:
            return f"token_id:{token}"
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        return f" {text}" if raw.startswith(WORD_START) and not text.startswith(" ") else text

    return text_of
