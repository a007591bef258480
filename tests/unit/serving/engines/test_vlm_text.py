from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from serving.engines.vlm.generation import Detokenizer, GenerationRequest, Message, TokenChunk, question, whole
from serving.engines.vlm.prompts import answer_tokens, end_token, inputs, render
from serving.errors import InvalidRequest
from tests.support.tiny_vlm import tiny_vlm_base

PICTURE = np.full((40, 24, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_vlm_base(tmp_path_factory.mktemp("prompts")).processor()


def test_a_question_is_rendered_up_to_its_answer(processor: Any) -> None:
    assert render(processor, question(PICTURE, "what is this?")) == (
        "<|im_start|>User:<image>what is this?<end_of_utterance>\nAssistant:"
    )


def test_a_batch_is_padded_on_the_left_and_each_row_is_what_it_is_alone(processor: Any) -> None:
    asks = [
        question(PICTURE, "red?"),
        question(PICTURE[:20], "which colour is it?"),
        GenerationRequest((Message("user", ("hi",)),)),
    ]
    batch = inputs(processor, asks)
    assert batch["pixel_values"].shape[0] == 3
    for row, ask in enumerate(asks):
        alone = inputs(processor, [ask])["input_ids"][0].tolist()
        assert batch["input_ids"][row, -len(alone) :].tolist() == alone
        assert batch["attention_mask"][row].sum() == len(alone)
    assert "pixel_values" not in inputs(processor, asks[2:])


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 50), (50, 3), (3, 3), (1, 2048), (2048, 1)])
def test_a_picture_of_any_size_is_read_by_its_rows(processor: Any, size: tuple[int, int]) -> None:
    ramp = np.zeros((*size, 3), np.uint8)
    ramp[:, :, 0] = 250  # red: whatever its size, red is what the model gets, and nothing else
    pixels = inputs(processor, [question(ramp, "red?")])["pixel_values"][0, 0]
    red, green, blue = (float(channel.mean()) for channel in pixels)
    assert red > 0.9 and green == blue == -1


def test_an_answer_ends_with_the_end_token(processor: Any) -> None:
    tokens = answer_tokens(processor, "red")
    assert tokens[-1] == end_token(processor) == processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert processor.tokenizer.decode(tokens[:-1]) == "red"


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ((), 0, "no message"),
        ((Message("user", (0, 1, "same?")),), 1, "Use every image once"),
        ((Message("user", ("what?",)),), 1, "Use every image once"),
        ((Message("user", (1, 0, "same?")),), 2, "reading order"),
        ((Message("user", ("an <image> of what?",)),), 0, "stands for an image"),
    ],
)
def test_messages_that_mean_nothing_are_refused(
    processor: Any, messages: tuple[Message, ...], images: int, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render(processor, GenerationRequest(messages, (PICTURE,) * images))


def test_a_chat_template_that_refuses_is_an_error_of_the_request(processor: Any) -> None:
    strict = type(processor)(processor.image_processor, processor.tokenizer, image_seq_len=4)
    strict.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(InvalidRequest, match="turns must alternate"):
        render(strict, question(PICTURE, "what?"))


def _said(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    words = Detokenizer(tokenizer, stop)
    return [words.take([token], i == len(tokens) - 1) for i, token in enumerate(tokens)], words


def test_chunks_of_random_tokens_add_up_to_what_the_tokenizer_decodes(processor: Any) -> None:
    chance, tokenizer = random.Random(0), processor.tokenizer
    for _ in range(200):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 20))]
        said, _ = _said(tokenizer, tokens)
        assert "".join(said) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_of_several_tokens_is_said_when_it_is_whole(processor: Any) -> None:
    tokens = processor.tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3  # the tiny tokenizer knows bytes only
    assert _said(processor.tokenizer, tokens)[0] == ["n", "", "é"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("blue",), "a red or "), ((" or", "red"), "a "), (("car",), "a red or blue"), (("blue!",), "a red or blue"),
        (("", "d o"), "a re"),
    ],
)  # fmt: skip
def test_nothing_after_a_stop_string_and_no_part_of_it_is_said(
    processor: Any, stop: tuple[str, ...], text: str
) -> None:
    tokens = processor.tokenizer("a red or blue", add_special_tokens=False)["input_ids"]
    said, words = _said(processor.tokenizer, tokens, stop)
    assert "".join(said) == text
    assert words.stopped == (text != "a red or blue")


async def test_a_stream_as_one_reply() -> None:
    async def chunks() -> Any:
        yield TokenChunk("re", (1, 2), (-0.5, -0.25), 7, 2)
        yield TokenChunk("d", (3,), (-1.0,), 7, 3, "stop")

    reply = await whole(chunks())
    assert (reply.text, reply.tokens, reply.logprobs) == ("red", (1, 2, 3), (-0.5, -0.25, -1.0))
    assert (reply.prompt_tokens, reply.finish) == (7, "stop")
