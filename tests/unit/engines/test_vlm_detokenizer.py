"""Text comes out as it becomes certain, and is what the tokenizer says of all tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from serving.engines.vlm.generation import Detokenizer, TokenChunk, whole
from tests.support.tiny_vlm import tiny_vlm_base


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_vlm_base(tmp_path_factory.mktemp("words")).processor().tokenizer


def _said(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    words = Detokenizer(tokenizer, stop)
    return [words.take([token], i == len(tokens) - 1) for i, token in enumerate(tokens)], words


def test_chunks_of_random_tokens_add_up_to_what_the_tokenizer_decodes(tokenizer: Any) -> None:
    chance = random.Random(0)
    for _ in range(200):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 20))]
        said, _ = _said(tokenizer, tokens)
        assert "".join(said) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_of_several_tokens_is_said_when_it_is_whole(tokenizer: Any) -> None:
    tokens = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3  # the tiny tokenizer knows bytes only
    assert _said(tokenizer, tokens)[0] == ["n", "", "é"]


def _stops() -> Iterator[tuple[tuple[str, ...], str]]:
    yield (("blue",), "a red or ")
    yield ((" or", "red"), "a ")
    yield (("car",), "a red or blue")
    yield (("blue!",), "a red or blue")
    yield (("", "d o"), "a re")


@pytest.mark.parametrize(("stop", "text"), list(_stops()))
def test_nothing_after_a_stop_string_and_no_part_of_it_is_said(
    tokenizer: Any, stop: tuple[str, ...], text: str
) -> None:
    tokens = tokenizer("a red or blue", add_special_tokens=False)["input_ids"]
    said, words = _said(tokenizer, tokens)
    assert "".join(said) == "a red or blue"
    said, words = _said(tokenizer, tokens, stop)
    assert "".join(said) == text
    assert words.stopped == (text != "a red or blue")


async def test_a_stream_as_one_reply() -> None:
    async def chunks() -> Any:
        yield TokenChunk("re", (1, 2), (-0.5, -0.25), 7, 2)
        yield TokenChunk("d", (3,), (-1.0,), 7, 3, "stop")

    reply = await whole(chunks())
    assert (reply.text, reply.tokens, reply.logprobs) == ("red", (1, 2, 3), (-0.5, -0.25, -1.0))
    assert (reply.prompt_tokens, reply.finish) == (7, "stop")
