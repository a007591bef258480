"""LiteLLM, through its OpenAI provider and its provider for OpenAI-compatible servers."""

from __future__ import annotations

from typing import Any

import contract
import litellm
from contract import check, raised

SERVER: dict[str, Any] = {"api_base": contract.URL, "api_key": contract.KEY, "max_retries": 0}
PROVIDERS = ("openai", "hosted_vllm", "custom_openai")
ASK: dict[str, Any] = SERVER | {
    "model": "openai/vlm", "messages": contract.MESSAGES, "max_tokens": contract.MAX_TOKENS, "temperature": 0,
}  # fmt: skip
EMBED: dict[str, Any] = {"model": "openai/clip", "input": contract.TEXTS, **SERVER}


@check
def embeddings() -> None:
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.embedding(**EMBED | {"model": f"{provider}/clip"})
        contract.assert_vectors([row["embedding"] for row in answer.data])
        assert answer.usage.prompt_tokens > 0


@check
def embeddings_as_float_and_base64() -> None:
    for encoding in ("float", "base64"):
        contract.assert_vectors([row["embedding"] for row in litellm.embedding(**EMBED, encoding_format=encoding).data])


@check
def embeddings_with_nulls() -> None:
    answer = litellm.embedding(**EMBED, **contract.EMBEDDING_NULLS)
    contract.assert_vectors([row["embedding"] for row in answer.data])


@check
def embeddings_cut_short() -> None:
    answer = litellm.embedding(**EMBED, dimensions=contract.SHORT, allowed_openai_params=["dimensions"])
    contract.assert_short([row["embedding"] for row in answer.data])


@check
def chat_with_an_image() -> None:
    for provider in PROVIDERS:
        answer = litellm.completion(**ASK | {"model": f"{provider}/vlm"})
        contract.assert_answer(answer.choices[0].message.content, answer.usage)


@check
def stream_with_usage() -> None:
    chunks = list(litellm.completion(**ASK, stream=True, stream_options={"include_usage": True}))
    usage = next(chunk.usage for chunk in reversed(chunks) if getattr(chunk, "usage", None))
    contract.assert_answer("".join(each.choices[0].delta.content or "" for each in chunks if each.choices), usage)


@check
def chat_with_nulls_and_defaults() -> None:
    nulls = {name: None for name in contract.CHAT_NULLS if name not in ("stream", "max_tokens", "temperature")}
    contract.assert_answer(litellm.completion(**ASK, **nulls).choices[0].message.content)
    sent = contract.defaults_but("temperature", "max_completion_tokens")
    contract.assert_answer(litellm.completion(**ASK, **sent, allowed_openai_params=[*sent]).choices[0].message.content)


@check
def conversation() -> None:
    first = litellm.completion(**ASK).choices[0].message
    for said in (first, first.model_dump()):
        rest = [said, {"role": "user", "content": "and now?"}]
        turns = [{"role": "system", "content": "be short"}, *contract.MESSAGES, *rest]
        assert litellm.completion(**ASK | {"messages": turns}).choices[0].message.role == "assistant"


@check
def rerank() -> None:
    server = {"api_base": contract.URL.removesuffix("/v1"), "api_key": contract.KEY}
    answer = litellm.rerank(
        model="hosted_vllm/vlm", query=contract.TEXTS[0], documents=contract.TEXTS, top_n=2, **server
    )
    contract.assert_ranked([(each["index"], each["relevance_score"]) for each in answer.results])


@check
def error_401() -> None:
    raised(litellm.AuthenticationError, lambda: litellm.embedding(**EMBED | {"api_key": contract.WRONG_KEY}))


@check
def error_404() -> None:
    raised(litellm.NotFoundError, lambda: litellm.embedding(**EMBED | {"model": "openai/gpt"}))
    raised(litellm.NotFoundError, lambda: litellm.completion(**ASK | {"model": "openai/gpt"}))


@check
def error_400() -> None:
    error = raised(litellm.BadRequestError, lambda: litellm.completion(**ASK, n=2))
    assert "n: " in str(error)


@check
def error_429() -> None:
    limited = ASK | {"api_key": contract.LIMITED_KEY}
    # LiteLLM retries embeddings twice, whatever it is told.
    litellm.completion(**limited)
    error = raised(litellm.RateLimitError, lambda: litellm.completion(**limited))
    headers = getattr(error, "litellm_response_headers", None) or error.response.headers
    contract.assert_wait(headers["retry-after"])


contract.report()
