"""LlamaIndex's ``OpenAILike`` and ``OpenAILikeEmbedding``."""

from __future__ import annotations

from typing import Any

import contract
import openai
from contract import check, raised
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

SERVER: dict[str, Any] = {"api_base": contract.URL, "api_key": contract.KEY, "max_retries": 0}
ASK = [ChatMessage(role="user", blocks=[ImageBlock(url=contract.IMAGE), TextBlock(text=contract.QUESTION)])]
check(contract.run_snippet)


def chat(**options: Any) -> OpenAILike:
    return OpenAILike(
        **{"model": "vlm", "is_chat_model": True, "temperature": 0, "max_tokens": contract.MAX_TOKENS}
        | SERVER
        | options
    )


def embedder(**options: Any) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(**{"model_name": "clip"} | SERVER | options)


@check
def embeddings() -> None:
    contract.assert_vectors(embedder().get_text_embedding_batch(contract.TEXTS))
    assert embedder().get_query_embedding(contract.TEXTS[0])


@check
def embeddings_as_float_and_base64() -> None:
    contract.assert_vectors(
        embedder(additional_kwargs={"encoding_format": "float"}).get_text_embedding_batch(contract.TEXTS)
    )


@check
def embeddings_with_nulls() -> None:
    sent = {"encoding_format": None, "dimensions": None, "user": None}
    contract.assert_vectors(embedder(additional_kwargs=sent).get_text_embedding_batch(contract.TEXTS))


@check
def chat_with_an_image() -> None:
    answer = chat().chat(ASK)
    assert answer.message.content == contract.ANSWER
    usage = answer.raw.usage  # type: ignore[union-attr]
    contract.assert_usage(usage.prompt_tokens, usage.completion_tokens)


@check
def stream_with_usage() -> None:
    options = {"stream_options": {"include_usage": True}}
    chunks = list(chat(additional_kwargs=options).stream_chat(ASK))
    assert "".join(chunk.delta or "" for chunk in chunks) == contract.ANSWER
    usage = chunks[-1].raw.usage  # type: ignore[union-attr]
    contract.assert_usage(usage.prompt_tokens, usage.completion_tokens)


@check
def chat_with_nulls_and_defaults() -> None:
    own = ("temperature", "max_completion_tokens")
    sent = {name: value for name, value in contract.DEFAULTS.items() if name not in own}
    assert chat(additional_kwargs=sent).chat(ASK).message.content == contract.ANSWER
    assert chat(temperature=0.1, max_tokens=None).chat(ASK).message.role == "assistant"


@check
def conversation() -> None:
    first = chat().chat(ASK).message
    turns = [ChatMessage(role="system", content="be short"), *ASK, first, ChatMessage(role="user", content="and now?")]
    assert chat().chat(turns).message.role == "assistant"


@check
def error_401() -> None:
    raised(openai.AuthenticationError, lambda: embedder(api_key=contract.WRONG_KEY).get_query_embedding("x"))


@check
def error_404() -> None:
    error = raised(openai.NotFoundError, lambda: chat(model="gpt").chat(ASK))
    assert error.code == "model_not_found"


@check
def error_400() -> None:
    error = raised(openai.BadRequestError, lambda: chat(additional_kwargs={"n": 2}).chat(ASK))
    assert error.param == "n"


@check
def error_429() -> None:
    limited = embedder(api_key=contract.LIMITED_KEY)
    limited.get_query_embedding("x")
    error = raised(openai.RateLimitError, lambda: limited.get_query_embedding("x"))
    contract.assert_wait(error.response.headers["retry-after"])


contract.report()
