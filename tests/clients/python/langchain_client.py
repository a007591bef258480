"""LangChain's ``langchain-openai``."""

from __future__ import annotations

from typing import Any

import contract
import openai
from contract import check, raised
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

SERVER: dict[str, Any] = {"base_url": contract.URL, "api_key": contract.KEY, "max_retries": 0}
ASK = [HumanMessage(contract.PARTS)]  # type: ignore[arg-type]
check(contract.run_snippet)


def chat(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": "vlm", "temperature": 0, "max_tokens": contract.MAX_TOKENS} | SERVER | options)


def embedder(**options: Any) -> OpenAIEmbeddings:
    """An embedding model that sends texts; the default sends token IDs of OpenAI's tokenizer."""
    return OpenAIEmbeddings(**{"model": "clip", "check_embedding_ctx_length": False} | SERVER | options)


@check
def embeddings() -> None:
    contract.assert_vectors(embedder().embed_documents(contract.TEXTS))
    assert embedder().embed_query(contract.TEXTS[0])


@check
def embeddings_as_float_and_base64() -> None:
    contract.assert_vectors(embedder(model_kwargs={"encoding_format": "float"}).embed_documents(contract.TEXTS))


@check
def embeddings_with_nulls() -> None:
    sent = {"encoding_format": None, "user": None}
    contract.assert_vectors(embedder(model_kwargs=sent).embed_documents(contract.TEXTS))


@check
def chat_with_an_image() -> None:
    answer = chat().invoke(ASK)
    assert answer.content == contract.ANSWER
    assert answer.usage_metadata is not None
    contract.assert_usage(answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"])
    standard: Any = {"type": "image", "url": contract.PARTS[0]["image_url"]["url"]}  # type: ignore[index]
    assert chat().invoke([HumanMessage([standard, contract.PARTS[1]])]).content == contract.ANSWER


@check
def stream_with_usage() -> None:
    chunks = list(chat(stream_usage=True).stream(ASK))
    assert "".join(str(chunk.content) for chunk in chunks) == contract.ANSWER
    usage = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
    contract.assert_usage(usage["input_tokens"], usage["output_tokens"])


@check
def chat_with_nulls_and_defaults() -> None:
    own = ("temperature", "max_completion_tokens", "metadata", "response_format")  # which mean something to LangChain
    sent = {name: value for name, value in contract.DEFAULTS.items() if name not in own}
    assert chat().bind(**sent).invoke(ASK).content == contract.ANSWER
    assert chat(n=None, seed=None, stop=None, top_p=None, logprobs=None).invoke(ASK).content == contract.ANSWER


@check
def conversation() -> None:
    first = chat().invoke(ASK)
    turns = [SystemMessage("be short"), *ASK, first, HumanMessage("and now?")]
    assert chat().invoke(turns).type == "ai"


@check
def error_401() -> None:
    raised(openai.AuthenticationError, lambda: embedder(api_key=contract.WRONG_KEY).embed_query("x"))
    raised(openai.AuthenticationError, lambda: chat(api_key=contract.WRONG_KEY).invoke(ASK))


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
    limited = embedder(api_key=contract.LIMITED_KEY)
    limited.embed_query("x")
    error = raised(openai.RateLimitError, lambda: limited.embed_query("x"))
    contract.assert_wait(error.response.headers["retry-after"])


contract.report()
