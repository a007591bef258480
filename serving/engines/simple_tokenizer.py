"""CLIP's byte-pair encoding in bounded time and memory; the ids are those of open_clip's ``SimpleTokenizer``.

open_clip builds a word anew for each merge, which is quadratic in its length, encodes what is cut off afterwards, and
keeps every word that it ever saw. Here the merges of a word come from a heap, a text is encoded only as far as its
context goes, and the cache is bounded. Neither open_clip nor torch is imported for it: together they take seven seconds
of a core, and the ingress, which makes the ids, needs nothing else of them.
"""

from __future__ import annotations

import gzip
import heapq
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import regex

from serving.engines.tokens import CLEAN, pad_rows

if TYPE_CHECKING:
    import torch

CACHED_WORDS: Final = 1 << 15
CACHED_LENGTH: Final = 64
"""Characters of the longest word that is cached: with :data:`CACHED_WORDS`, the cache stays below about 20 MiB."""
END: Final = "</w>"
MERGES: Final = 49152 - 256 - 2
"""Of the vocabulary's file, the lines that OpenAI's models were trained with."""
WORDS: Final = r"""|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class BoundedTokenizer:
    """Linear in the texts' length, up to a logarithm. Safe to call from several threads.

    >>> BoundedTokenizer(tokens.vocabulary(), context_length=8).rows(["a cat"])
    [[49406, 320, 2368, 49407]]
    """

    pad_id: Final = 0

    def __init__(
        self,
        vocabulary: Path,
        context_length: int,
        clean: str = "lower",
        additional_special_tokens: Sequence[str] = (),
        reduction_mask: str = "",
    ) -> None:
        """Args:
        vocabulary: open_clip's file of merges.
        clean, additional_special_tokens, reduction_mask: as of open_clip's class.
        """
        self.context_length = context_length
        lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]
        special = ["<start_of_text>", "<end_of_text>", *additional_special_tokens]
        self._bytes = byte_characters()
        characters = list(self._bytes.values())
        symbols = [*characters, *(each + END for each in characters), *map("".join, merges), *special]
        self.encoder = {symbol: number for number, symbol in enumerate(symbols)}
        self.bpe_ranks = {(pair[0], pair[1]): rank for rank, pair in enumerate(merges)}
        self._special = frozenset(special)
        self._pattern = regex.compile("|".join(special) + WORDS, regex.IGNORECASE)
        self.sot_token_id, self.eot_token_id = (self.encoder[token] for token in special[:2])
        self._clean = CLEAN[clean]
        self._reduction_mask = reduction_mask
        self._cached = lru_cache(maxsize=CACHED_WORDS)(self._merged)

    def bpe(self, token: str) -> str:
        """The parts of a byte-encoded word, separated by spaces; the last one ends in ``</w>``."""
        if token in self._special:
            return token
        return self._cached(token) if len(token) <= CACHED_LENGTH else self._merged(token)

    def _merged(self, token: str) -> str:
        return " ".join(merge((*token[:-1], token[-1] + END), self.bpe_ranks))

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its start and its end, cut to the context: no padding."""
        if self._reduction_mask:
            return [_until_last(row, self.eot_token_id) for row in self._reduced(texts).tolist()]
        room = self.context_length - 2
        return [[self.sot_token_id, *self._ids(text, room), self.eot_token_id] for text in texts]

    def cuts(self, text: str, row: Sequence[int]) -> bool:
        """Whether ``row``, which :meth:`rows` made of the text, lacks a part of it."""
        room = self.context_length - 2
        if self._reduction_mask:
            return len(self._ids(text)) > room
        return len(row) >= self.context_length and len(self._ids(text, room + 1)) > room

    def _ids(self, text: str, room: int | None = None) -> list[int]:
        ids: list[int] = []
        for match in self._pattern.finditer(self._clean(text)):
            word = "".join(self._bytes[byte] for byte in match.group().encode("utf-8"))
            ids.extend(self.encoder[part] for part in self.bpe(word).split(" "))
            if room is not None and len(ids) >= room:
                break
        return ids[:room]

    def _reduced(self, texts: Sequence[str]) -> torch.Tensor:
        """What open_clip keeps of texts that are too long, where a model was trained so."""
        import torch
        from open_clip.tokenizer import get_reduction_mask_fn

        reduce = get_reduction_mask_fn(self._reduction_mask)
        return torch.as_tensor(
            reduce(
                list(texts), context_length=self.context_length, sot_token_id=self.sot_token_id,
                eot_token_id=self.eot_token_id, encode_fn=self._ids,
            )
        )  # fmt: skip

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """``int64 [n, context_length]``, padded with 0."""
        if self._reduction_mask:
            return self._reduced(texts)
        return pad_rows(self.rows(texts), self.context_length, self.pad_id)


def byte_characters() -> dict[int, str]:
    """A printable character for each byte: the byte's own where it has one, else one beyond Latin-1 (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _until_last(row: list[int], end: int) -> list[int]:
    return row[: len(row) - row[::-1].index(end)]


def merge(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte-pair merges (Sennrich et al. 2016): the pair of lowest rank is merged wherever it occurs, from left to
    right, until no pair has a rank. O(n log n).

    Each round takes all places of one rank before it looks at the pairs that their merges made, as in the reference.
    """
    parts: list[str] = list(symbols)
    count = len(parts)
    following = [*range(1, count), -1]
    previous = list(range(-1, count - 1))
    heap = [
        (rank, left) for left in range(count - 1) if (rank := ranks.get((parts[left], parts[left + 1]))) is not None
    ]
    heapq.heapify(heap)

    def rank_at(left: int) -> int | None:
        right = following[left]
        return ranks.get((parts[left], parts[right])) if right >= 0 and parts[left] else None

    while heap:
        lowest = heap[0][0]
        merged: list[int] = []
        while heap and heap[0][0] == lowest:
            _, left = heapq.heappop(heap)
            if rank_at(left) != lowest:  # one of the two is part of another merge by now
                continue
            right = following[left]
            parts[left] += parts[right]
            parts[right] = ""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            merged.append(left)
        for left in merged:
            for place in (previous[left], left):
                if place >= 0 and (rank := rank_at(place)) is not None:
                    heapq.heappush(heap, (rank, place))
    return [part for part in parts if part]
