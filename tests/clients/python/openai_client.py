"""The ``openai`` client of Python, in whichever version is installed."""

from __future__ import annotations

from typing import Any

import contract
import openai
from contract import check, raised

client = openai.OpenAI(base_url=contract.URL, api_key=contract.KEY, max_retries=0)
ASK: dict[str, Any] = {
    "model": "vlm", "messages": contract.MESSAGES, "max_tokens": contract.MAX_TOKENS, "temperature": 0,
}  # fmt: skip
ask = client.chat.completions.create
embed = client.embeddings.create


@check
def embeddings() -> None:
    answer = embed(model="clip", input=contract.TEXTS)
    contract.assert_vectors([row.embedding for row in answer.data])
    assert answer.usage.prompt_tokens > 0


@check
def embeddings_as_float_and_base64() -> None:
    for encoding in ("float", "base64"):
        answer = embed(model="clip", input=contract.TEXTS, encoding_format=encoding)
        contract.assert_vectors([row.embedding for row in answer.data])


@check
def embeddings_with_nulls() -> None:
    answer = embed(model="clip", input=contract.TEXTS, extra_body=contract.EMBEDDING_NULLS)
    contract.assert_vectors([row.embedding for row in answer.data])
    assert len(embed(model="clip", input=[{"image": contract.IMAGE}]).data) == 1  # type: ignore[list-item]


@check
def embeddings_cut_short() -> None:
    for encoding in (openai.omit, "float"):
        answer = embed(model="clip", input=contract.TEXTS, dimensions=contract.SHORT, encoding_format=encoding)
        contract.assert_short([row.embedding for row in answer.data])


@check
def chat_with_an_image() -> None:
    answer = ask(**ASK)
    contract.assert_answer(answer.choices[0].message.content, answer.usage)


@check
def stream_with_usage() -> None:
    chunks = list(ask(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    contract.assert_answer(text, chunks[-1].usage)


@check
def chat_with_nulls_and_defaults() -> None:
    nulls = ask(model="vlm", messages=contract.MESSAGES, extra_body=contract.CHAT_NULLS)
    assert nulls.choices[0].finish_reason
    answer = ask(model="vlm", messages=contract.MESSAGES, **contract.DEFAULTS)
    contract.assert_answer(answer.choices[0].message.content)
    options: Any = {"include_usage": None, "include_obfuscation": None}
    chunks = list(ask(**ASK, stream=True, stream_options=options))
    assert chunks[-1].choices[0].finish_reason


@check
def conversation() -> None:
    first = ask(**ASK).choices[0].message
    turns = [
        {"role": "developer", "content": [{"type": "text", "text": "be short"}]}, *contract.MESSAGES,
        first.model_dump(), {"role": "user", "content": "and now?", "name": "ann"},
    ]  # fmt: skip
    assert ask(**ASK | {"messages": turns}).choices[0].message.role == "assistant"
    turns[2] = first  # type: ignore[call-overload]
    assert ask(**ASK | {"messages": turns}).choices[0].message.role == "assistant"


@check
def structured_output() -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "color", "strict": True, "schema": contract.SCHEMA}}
    how: dict[str, Any] = ASK | {"response_format": wanted, "max_tokens": contract.SCHEMA_TOKENS}
    if contract.STRUCTURED:
        contract.assert_structured(ask(**how).choices[0].message.content)
    else:
        assert raised(openai.BadRequestError, lambda: ask(**how)).param == "response_format"


@check
def several_answers() -> None:
    answer = ask(**ASK | {"n": 2, "temperature": 1, "seed": 7})
    assert [choice.index for choice in answer.choices] == [0, 1]


@check
def models() -> None:
    names = {model.id for model in client.models.list()}
    assert {"clip", "vlm"} <= names
    assert client.models.retrieve("vlm").object == "model"


@check
def error_401() -> None:
    error = raised(openai.AuthenticationError, client.with_options(api_key=contract.WRONG_KEY).models.list)
    assert error.code == "invalid_api_key"


@check
def error_404() -> None:
    error = raised(openai.NotFoundError, lambda: embed(model="gpt", input="x"))
    assert (error.code, error.param) == ("model_not_found", "model")
    raised(openai.NotFoundError, lambda: ask(**ASK | {"model": "gpt"}))


@check
def error_400() -> None:
    refused: list[dict[str, Any]] = [
        {"n": 2}, {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"reasoning_effort": "high"},
    ]  # fmt: skip
    for extra in refused:
        error = raised(openai.BadRequestError, lambda extra=extra: ask(**ASK, **extra))
        assert error.param == next(iter(extra)), error
        assert error.type == "invalid_request_error"
    error = raised(openai.BadRequestError, lambda: embed(model="clip", input="x", dimensions=7))
    assert error.param == "dimensions"


@check
def error_429() -> None:
    limited = client.with_options(api_key=contract.LIMITED_KEY)
    limited.models.list()
    error = raised(openai.RateLimitError, limited.models.list)
    assert error.code == "rate_limited"
    contract.assert_wait(error.response.headers["retry-after"])


contract.report()
