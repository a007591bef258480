"""LangChain's ``langchain-openai``."""

from __future__ import annotations

from typing import Any

import openai
from contract import (
    ANSWER,
    DEFAULTS,
    KEY,
    LIMITED_KEY,
    MAX_TOKENS,
    PARTS,
    TEXTS,
    URL,
    WRONG_KEY,
    assert_usage,
    assert_vectors,
    assert_wait,
    check,
    raised,
    report,
    run_snippet,
)
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

SERVER: dict[str, Any] = {"base_url": URL, "api_key": KEY, "max_retries": 0}
ASK = [HumanMessage(PARTS)]  # type: ignore[arg-type]
check(run_snippet)


def chat(**options: Any) -> ChatOpenAI:
    """A chat model that answers as plain HTTP was answered."""
    return ChatOpenAI(**{"model": "vlm", "temperature": 0, "max_tokens": MAX_TOKENS} | SERVER | options)


def embedder(**options: Any) -> OpenAIEmbeddings:
    """The default sends token ids of OpenAI's tokenizer; this one sends texts."""
    return OpenAIEmbeddings(**{"model": "clip", "check_embedding_ctx_length": False} | SERVER | options)


@check
def embeddings() -> None:
    assert_vectors(embedder().embed_documents(TEXTS))
    assert embedder().embed_query(TEXTS[0])


@check
def embeddings_as_float_and_base64() -> None:
    assert_vectors(embedder(model_kwargs={"encoding_format": "float"}).embed_documents(TEXTS))


@check
def embeddings_with_nulls() -> None:
    sent = {"encoding_format": None, "user": None}
    assert_vectors(embedder(model_kwargs=sent).embed_documents(TEXTS))


@check
def chat_with_an_image() -> None:
    answer = chat().invoke(ASK)
    assert answer.content == ANSWER
    assert answer.usage_metadata is not None
    assert_usage(answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"])
    standard: Any = {"type": "image", "url": PARTS[0]["image_url"]["url"]}  # type: ignore[index]
    assert chat().invoke([HumanMessage([standard, PARTS[1]])]).content == ANSWER


@check
def stream_with_usage() -> None:
    chunks = list(chat(stream_usage=True).stream(ASK))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    usage = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
    assert_usage(usage["input_tokens"], usage["output_tokens"])


@check
def chat_with_nulls_and_defaults() -> None:
    own = ("temperature", "max_completion_tokens", "metadata", "response_format")  # which mean something to LangChain
    sent = {name: value for name, value in DEFAULTS.items() if name not in own}
    assert chat().bind(**sent).invoke(ASK).content == ANSWER
    assert chat(n=None, seed=None, stop=None, top_p=None, logprobs=None).invoke(ASK).content == ANSWER


@check
def conversation() -> None:
    first = chat().invoke(ASK)
    turns = [SystemMessage("be short"), *ASK, first, HumanMessage("and now?")]
    assert chat().invoke(turns).type == "ai"


@check
def error_401() -> None:
    raised(openai.AuthenticationError, lambda: embedder(api_key=WRONG_KEY).embed_query("x"))
    raised(openai.AuthenticationError, lambda: chat(api_key=WRONG_KEY).invoke(ASK))


@check
def error_404() -> None:
    error = raised(openai.NotFoundError, lambda: chat(model="gpt").invoke(ASK))
    assert error.code == "model_not_found"


@check
def error_400() -> None:
    error = raised(openai.BadRequestError, lambda: chat(n=2).invoke(ASK))
    assert error.param == "n"
    schema = {"title": "color", "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    error = raised(openai.BadRequestError, lambda: chat().with_structured_output(schema).invoke(ASK))
    assert error.param == "response_format"


@check
def error_429() -> None:
    limited = embedder(api_key=LIMITED_KEY)
    limited.embed_query("x")
    error = raised(openai.RateLimitError, lambda: limited.embed_query("x"))
    assert_wait(error.response.headers["retry-after"])


report()
