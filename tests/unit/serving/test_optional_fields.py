"""Optional fields as clients send them: null is a field that was left out, a default is accepted, the rest is named."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serving.http.bodies import is_empty
from serving.http.chat import ChatRequest, refuse_unknown
from serving.http.embeddings import EmbeddingsRequest
from serving.http.errors import ApiError

IMAGE = "data:image/png;base64,AAAA"
SAID = {"role": "user", "content": "hello"}


def chat(**fields: Any) -> ChatRequest:
    """A checked request."""
    request = ChatRequest.model_validate({"messages": [SAID], **fields})
    refuse_unknown(request)
    return request


@pytest.mark.parametrize("name", ["encoding_format", "dimensions", "user", "model", "input_type", "timeout"])
def test_a_null_field_of_an_embeddings_request_counts_as_left_out(name: str) -> None:
    assert EmbeddingsRequest.model_validate({"input": "x", name: None}) == EmbeddingsRequest(input="x")


def test_nulls_inside_of_inputs_count_as_left_out() -> None:
    shown = {"type": "image_url", "image_url": {"url": IMAGE, "detail": None, "format": None}, "text": None}
    text = {"type": "text", "text": "x", "cache_control": None}
    request = EmbeddingsRequest.model_validate({"input": [shown, text, {"image": IMAGE, "text": None}]})
    assert [type(item).__name__ for item in request.input] == ["ImageUrlItem", "TextItem", "ImageItem"]


@pytest.mark.parametrize("fields", [{"input_type": "query"}, {"encoding_format": "int8"}, {"input": None}])
def test_a_field_of_an_embeddings_request_that_would_change_the_answer_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": "x"} | fields)
    assert caught.value.errors()[0]["loc"][0] == next(iter(fields))


@pytest.mark.parametrize(
    "name", ["model", "n", "tools", "reasoning_effort", "stream_options", "seed", "audio", "what_comes_next_year"]
)
def test_a_null_field_of_a_chat_request_counts_as_left_out(name: str) -> None:
    assert chat(**{name: None}) == chat()


def test_nulls_inside_of_messages_and_stream_options_count_as_left_out() -> None:
    parts = [
        {"type": "text", "text": "x", "image_url": None, "cache_control": None},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": None, "format": None}, "text": None},
    ]
    request = chat(
        messages=[{"role": "user", "content": parts, "tool_calls": None}],
        stream_options={"include_usage": None, "include_obfuscation": None},
    )
    assert [part.type for part in request.messages[0].content] == ["text", "image_url"]
    assert request.include_usage is False


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"verbosity": "medium"}])
def test_a_default_value_is_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


@pytest.mark.parametrize("fields", [{"reasoning_effort": "high"}, {"verbosity": "low"}, {"prediction": {}}])
def test_a_value_that_cannot_be_honoured_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.param == next(iter(fields))


def test_an_answer_is_taken_back_with_the_empty_fields_that_libraries_add() -> None:
    added = {"provider_specific_fields": {"refusal": None}, "tool_calls": [], "reasoning_content": "", "audio": None}
    request = chat(messages=[SAID, {"role": "assistant", "content": "hi", **added}, SAID])
    assert request.messages[1].role == "assistant"


@pytest.mark.parametrize("value", [0, False, "x", [None], {"a": 0}, {"a": {}}])
def test_what_has_a_content_is_not_empty(value: Any) -> None:
    assert not is_empty(value)
