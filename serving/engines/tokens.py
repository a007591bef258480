"""Texts to the same token IDs as open_clip's, without padding where the tower allows. The tokenizer in ``base.json``:

    {"kind": "simple", "kwargs": {}}             CLIP's BPE, from the open_clip package
    {"kind": "hf", "directory": "text", "trim": true, "mode": null, "kwargs": {}}    files in the base directory

Texts are cleaned first as in open_clip (:data:`CLEAN`). The ingress makes the IDs, so neither open_clip nor torch is
imported: together they take seven seconds of a core."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import string
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ftfy
import regex
from tokenizers.models import BPE

from core.digests import digest_bytes, digest_json
from core.errors import BaseModelError

if TYPE_CHECKING:
    import torch

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
END: Final = "</w>"
MERGES: Final = 49152 - 256 - 2
"""Lines of the vocabulary file that OpenAI's models were trained with."""
WORDS: Final = r"""|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def whitespace(text: str) -> str:
    """Repair Unicode, unescape HTML entities (twice) and normalise white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def lower(text: str) -> str:
    return whitespace(text).lower()


def canonicalize(text: str) -> str:
    """Repair and unescape a text, lower-case it and remove punctuation, as for SigLIP."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(repaired.replace("_", " ").translate(_PUNCTUATION).lower().split())


CLEAN: Final[Mapping[str, Callable[[str], str]]] = {
    "whitespace": whitespace, "lower": lower, "canonicalize": canonicalize,
}  # fmt: skip
"""Keys are open_clip's names."""


class Tokenizer(ABC):
    """Texts to token IDs. Thread safe."""

    context_length: int
    trim: bool = False
    """True if batches are as wide as their longest text instead of the full context."""
    pad_id: int = 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """``int64 [n, at most context_length]``, padded."""
        rows = self.rows(texts)
        width = max((len(row) for row in rows), default=1) if self.trim else self.context_length
        return pad_rows(rows, width, self.pad_id)

    @abstractmethod
    def rows(self, texts: list[str]) -> list[list[int]]:
        """Token IDs of each text with start and end, cut to the context, without padding."""

    @abstractmethod
    def cuts(self, text: str, row: Sequence[int]) -> bool:
        """True if ``row``, made from ``text`` by :meth:`rows`, is truncated."""


def pad_rows(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> torch.Tensor:
    """``int64 [n, width]`` from n rows of at most ``width`` IDs."""
    import torch  # imported here: making IDs needs no torch

    padded = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


def make_tokenizer(config: dict[str, Any], directory: Path, context_length: int) -> Tokenizer:
    """Make the tokenizer for ``config``. Reads only files of the base directory and of open_clip."""
    kwargs = dict(config.get("kwargs") or {})
    if config["kind"] == "simple":
        clean = kwargs.pop("clean", "lower")
        if kwargs:
            raise BaseModelError(f"The tokenizer's options {sorted(kwargs)} are not served.", "Use another model.")
        return _simple(context_length, clean)
    files = directory / config["directory"]
    if (files / "tokenizer.json").is_file() and not config.get("mode") and set(kwargs) <= {"clean"}:
        return _Fast(files / "tokenizer.json", context_length, bool(config.get("trim")), **kwargs)
    return _Slow(files, context_length, bool(config.get("trim")), config.get("mode"), kwargs)


@cache
def _simple(context_length: int, clean: str) -> Tokenizer:
    """Cached: reading the vocabulary takes 0.1 s, and an update needs it several times."""
    return BoundedTokenizer(vocabulary(), context_length, clean)


def tokenizer_digest(config: dict[str, Any], directory: Path) -> str:
    """64 hex digits over the description and the vocabulary files."""
    if config["kind"] == "simple":
        return digest_bytes(digest_json(config).encode(), vocabulary().read_bytes())
    files = sorted(p for p in (directory / config["directory"]).iterdir() if p.is_file())
    parts = [part for p in files for part in (p.name.encode(), p.read_bytes())]
    return digest_bytes(digest_json(config).encode(), *parts)


def vocabulary() -> Path:
    """The vocabulary file in open_clip's package, found without importing it (seconds)."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


class BoundedTokenizer(Tokenizer):
    """CLIP's byte-pair encoding with the IDs of open_clip's ``SimpleTokenizer``, which rebuilds a word for each merge
    (quadratic), encodes text beyond the context, and caches every word. Here merges are those of ``tokenizers``, whose
    cache is bounded, and encoding stops at the context's end. Thread safe."""

    def __init__(self, vocabulary: Path, context_length: int, clean: str = "lower") -> None:
        """``vocabulary``: open_clip's merges file; ``clean``: a key of :data:`CLEAN`."""
        self.context_length = context_length
        lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
        special = ("<start_of_text>", "<end_of_text>")
        self._bytes = byte_characters()
        characters = list(self._bytes.values())
        symbols = [*characters, *(each + END for each in characters), *map("".join, merges), *special]
        ids = {symbol: number for number, symbol in enumerate(symbols)}
        self._model = BPE(ids, [(left, right) for left, right in merges], end_of_word_suffix=END)
        self._special = {token: ids[token] for token in special}
        self._pattern = regex.compile("|".join(special) + WORDS, regex.IGNORECASE)
        self._start, self._end = self._special.values()
        self._clean = CLEAN[clean]

    def rows(self, texts: list[str]) -> list[list[int]]:
        room = self.context_length - 2
        return [[self._start, *self._ids(text, room), self._end] for text in texts]

    def cuts(self, text: str, row: Sequence[int]) -> bool:
        room = self.context_length - 2
        return len(row) >= self.context_length and len(self._ids(text, room + 1)) > room

    def word(self, text: str) -> list[int]:
        """IDs of a word of the text's pattern."""
        if text in self._special:
            return [self._special[text]]
        return [part.id for part in self._model.tokenize("".join(self._bytes[byte] for byte in text.encode()))]

    def _ids(self, text: str, room: int) -> list[int]:
        ids: list[int] = []
        for match in self._pattern.finditer(self._clean(text)):
            ids.extend(self.word(match.group()))
            if len(ids) >= room:
                break
        return ids[:room]


def byte_characters() -> dict[int, str]:
    """GPT-2's table of printable characters: the byte's own character, or one beyond Latin-1."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


class _Fast(Tokenizer):
    """A ``tokenizer.json`` without transformers: 10 times faster and thread safe. transformers sets truncation and
    padding again in each call, which fails with "Already borrowed" in threads."""

    def __init__(self, file: Path, context_length: int, trim: bool, clean: str = "whitespace") -> None:
        from tokenizers import Tokenizer as Rust

        self.inner = Rust.from_file(str(file))
        padding = self.inner.padding
        self.pad_id = int(padding["pad_id"]) if padding else _pad_id(file, self.inner)
        self.inner.no_padding()
        self.inner.enable_truncation(context_length)
        self.context_length = context_length
        self.trim = trim
        self.clean = CLEAN[clean]

    def rows(self, texts: list[str]) -> list[list[int]]:
        return [self.inner.encode(self.clean(text)).ids for text in texts]

    def cuts(self, text: str, row: Sequence[int]) -> bool:
        return len(row) >= self.context_length and bool(self.inner.encode(self.clean(text)).overflowing)


class _Slow(Tokenizer):
    """open_clip's HFTokenizer, for tokenizers with special options. Locked: one call at a time."""

    def __init__(self, files: Path, context_length: int, trim: bool, mode: str | None, kwargs: dict[str, Any]) -> None:
        from open_clip.tokenizer import HFTokenizer

        self.inner = HFTokenizer(str(files), context_length=context_length, tokenizer_mode=mode, **kwargs)
        self.context_length = context_length
        self.trim = trim and not mode
        self.pad_id = int(self.inner.tokenizer.pad_token_id or 0)
        self.lock = threading.Lock()

    def rows(self, texts: list[str]) -> list[list[int]]:
        """Token IDs, cut before padding, since the pad ID may also occur in texts. Rows are padded if the tokenizer has
        a mode or does not pad on the right."""
        if self.inner.tokenizer_mode or self.inner.tokenizer.padding_side != "right":
            with self.lock:
                padded: list[list[int]] = self.inner(texts).tolist()
            return padded
        cleaned = [self.inner.clean_fn(text) for text in texts]
        with self.lock:
            ids = self.inner.tokenizer(cleaned, max_length=self.context_length, truncation=True)["input_ids"]
        stripped = self.inner.tokenizer.sep_token_id if self.inner.strip_sep_token else None
        return [[0 if token == stripped else token for token in row] for row in ids]

    def cuts(self, text: str, row: Sequence[int]) -> bool:
        if len(row) < self.context_length:
            return False
        with self.lock:
            whole = self.inner.tokenizer(self.inner.clean_fn(text), truncation=False)["input_ids"]
        return len(whole) > self.context_length


def _pad_id(file: Path, inner: Any) -> int:
    config = file.with_name("tokenizer_config.json")
    token: Any = json.loads(config.read_text())["pad_token"] if config.is_file() else "[PAD]"
    if isinstance(token, dict):
        token = token["content"]
    token_id = inner.token_to_id(token)
    return int(token_id) if token_id is not None else 0
