"""CLIP's byte-pair encoding in bounded time and memory; the ids are those of open_clip's ``SimpleTokenizer``.

open_clip builds a word anew for each merge, which is quadratic in its length, encodes what is cut off afterwards, and
keeps every word that it ever saw. Here the merges of a word come from a heap, a text is encoded only as far as its
context goes, and the cache is bounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from open_clip.tokenizer import SimpleTokenizer

from serving.engines.tokens import pad_rows

CACHED_WORDS: Final = 1 << 15
CACHED_LENGTH: Final = 64
"""Characters of the longest word that is cached: with :data:`CACHED_WORDS`, the cache stays below about 20 MiB."""
END: Final = "</w>"


class BoundedTokenizer(SimpleTokenizer):  # type: ignore[misc]
    """Linear in the texts' length, up to a logarithm. Safe to call from several threads.

    >>> BoundedTokenizer(context_length=8)(["a cat"]).tolist()
    [[49406, 320, 2368, 49407, 0, 0, 0, 0]]
    """

    pad_id: Final = 0

    def __init__(self, context_length: int, **kwargs: Any) -> None:
        """``kwargs``: of open_clip's class (``clean``, ``additional_special_tokens``, ``reduction_mask``)."""
        super().__init__(context_length=context_length, **kwargs)
        self._cached = lru_cache(maxsize=CACHED_WORDS)(self._merged)

    def bpe(self, token: str) -> str:
        """The parts of a byte-encoded word, separated by spaces; the last one ends in ``</w>``."""
        if token in self.cache:  # the special tokens, and nothing else
            return str(self.cache[token])
        return self._cached(token) if len(token) <= CACHED_LENGTH else self._merged(token)

    def _merged(self, token: str) -> str:
        return " ".join(merge((*token[:-1], token[-1] + END), self.bpe_ranks))

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text with its start and its end, cut to the context: no padding."""
        if self.reduction_fn is not None:
            return [_until_last(row, self.eot_token_id) for row in super().__call__(list(texts)).tolist()]
        return [[self.sot_token_id, *self._first(text), self.eot_token_id] for text in texts]

    def _first(self, text: str) -> list[int]:
        room = int(self.context_length) - 2
        ids: list[int] = []
        for match in self.pat.finditer(self.clean_fn(text)):
            word = "".join(self.byte_encoder[byte] for byte in match.group().encode("utf-8"))
            ids.extend(self.encoder[part] for part in self.bpe(word).split(" "))
            if len(ids) >= room:
                break
        return ids[:room]

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        """``int64 [n, context_length]``, padded with 0."""
        if self.reduction_fn is not None or context_length not in (None, self.context_length):
            return torch.as_tensor(super().__call__(texts, context_length))
        return pad_rows(self.rows(texts), int(self.context_length), self.pad_id)


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
        made: list[int] = []
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
            made.append(left)
        for left in made:
            for place in (previous[left], left):
                if place >= 0 and (rank := rank_at(place)) is not None:
                    heapq.heappush(heap, (rank, place))
    return [part for part in parts if part]
