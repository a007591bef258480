"""LangChain's ``langchain-openai``."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import contract
import openai
from contract import check, raised
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

SERVER: dict[str, Any] = {"base_url": contract.URL, "api_key": contract.KEY, "max_retries": 0}
ASK = [HumanMessage(contract.PARTS)]  # type: ignore[arg-type]
EMBEDDER = OpenAIEmbeddings(model="clip", check_embedding_ctx_length=False, **SERVER)
"""It sends texts; the default sends token IDs of OpenAI's tokenizer."""


def chat(**options: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": "vlm", "temperature": 0, "max_tokens": contract.MAX_TOKENS} | SERVER | options)


def used(metadata: Any) -> SimpleNamespace:
    return SimpleNamespace(prompt_tokens=metadata["input_tokens"], completion_tokens=metadata["output_tokens"])


@check
def embeddings() -> None:
    contract.assert_vectors(EMBEDDER.embed_documents(contract.TEXTS))
    assert EMBEDDER.embed_query(contract.TEXTS[0])


@check
def embeddings_cut_short() -> None:
    short = OpenAIEmbeddings(model="clip", check_embedding_ctx_length=False, dimensions=contract.SHORT, **SERVER)
    contract.assert_short(short.embed_documents(contract.TEXTS))


@check
def chat_with_an_image() -> None:
    answer = chat().invoke(ASK)
    contract.assert_answer(answer.content, used(answer.usage_metadata))
    standard: Any = {"type": "image", "url": contract.IMAGE}
    contract.assert_answer(chat().invoke([HumanMessage([standard, contract.PARTS[1]])]).content)


@check
def stream_with_usage() -> None:
    chunks = list(chat(stream_usage=True).stream(ASK))
    usage = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
    contract.assert_answer("".join(str(chunk.content) for chunk in chunks), used(usage))


@check
def conversation() -> None:
    turns = [SystemMessage("be short"), *ASK, chat().invoke(ASK), HumanMessage("and now?")]
    assert chat().invoke(turns).type == "ai"


@check
def error_400() -> None:
    error = raised(openai.BadRequestError, lambda: chat(n=2).invoke(ASK))
    assert error.param == "n"


@check
def structured_output() -> None:
    wanted = chat(max_tokens=contract.SCHEMA_TOKENS).with_structured_output(contract.SCHEMA)
    if contract.STRUCTURED:
        contract.assert_structured(json.dumps(wanted.invoke(ASK)))
    else:
        assert raised(openai.BadRequestError, lambda: wanted.invoke(ASK)).param == "response_format"


contract.report()
