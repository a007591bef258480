"""From tokens to text, as they come; and where an answer stops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from serving.engines.vlm.generation import GenerationResult, TokenChunk

_UNFINISHED = "\ufffd"
"""What a decoder shows for the first bytes of a character whose last bytes have not come yet."""


class Detokenizer:
    """The text of one answer. Text that was returned is never withdrawn: a part that could be the beginning of a stop
    string, or of a character, waits for the tokens after it.

    Everything that :meth:`take` returned, put together, is ``tokenizer.decode(tokens, skip_special_tokens=True)``, cut
    before the first stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._backend = tokenizer._tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(text for text in stop if text)
        self._hold = max((len(text) - 1 for text in self._stop), default=0)
        self._tokens: list[int] = []
        self._text = ""
        self._sent = 0
        self.stopped = False
        """A stop string came; everything after it is dropped."""

    def take(self, tokens: Sequence[int], last: bool) -> str:
        """The text that became certain with these tokens. ``last``: no more tokens will come."""
        if self.stopped:
            return ""
        searched = max(0, len(self._text) - self._hold)
        for token in tokens:
            self._tokens.append(token)
            self._text += self._stream.step(self._backend, token) or ""
        if last:
            whole = str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
            if whole.startswith(self._text[: self._sent]):
                self._text = whole
        stops = [index for index in (self._text.find(text, searched) for text in self._stop) if index >= 0]
        if stops:
            self.stopped = True
            self._text = self._text[: min(stops)]
        end = len(self._text) if last or self.stopped else max(self._sent, len(self._text) - self._hold)
        certain = self._text[self._sent : end]
        if not (last or self.stopped):
            certain = certain.rstrip(_UNFINISHED)
        self._sent += len(certain)
        return certain


async def whole(chunks: AsyncIterator[TokenChunk]) -> GenerationResult:
    """A stream as one reply."""
    parts = [chunk async for chunk in chunks]
    return GenerationResult(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        tuple(value for part in parts for value in part.logprobs),
        parts[-1].prompt_tokens,
        parts[-1].finish,
    )
