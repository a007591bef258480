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
EMBEDDER = OpenAILikeEmbedding(model_name="clip", **SERVER)


def chat(**options: Any) -> OpenAILike:
    own = {"model": "vlm", "is_chat_model": True, "temperature": 0, "max_tokens": contract.MAX_TOKENS}
    return OpenAILike(**own | SERVER | options)


@check
def embeddings() -> None:
    contract.assert_vectors(EMBEDDER.get_text_embedding_batch(contract.TEXTS))
    assert EMBEDDER.get_query_embedding(contract.TEXTS[0])


@check
def embeddings_cut_short() -> None:
    short = OpenAILikeEmbedding(model_name="clip", dimensions=contract.SHORT, **SERVER)
    contract.assert_short(short.get_text_embedding_batch(contract.TEXTS))


@check
def chat_with_an_image() -> None:
    answer = chat().chat(ASK)
    contract.assert_answer(answer.message.content, answer.raw.usage)  # type: ignore[union-attr]


@check
def stream_with_usage() -> None:
    chunks = list(chat(additional_kwargs={"stream_options": {"include_usage": True}}).stream_chat(ASK))
    contract.assert_answer("".join(chunk.delta or "" for chunk in chunks), chunks[-1].raw.usage)  # type: ignore[union-attr]


@check
def conversation() -> None:
    first = chat().chat(ASK).message
    turns = [ChatMessage(role="system", content="be short"), *ASK, first, ChatMessage(role="user", content="and now?")]
    assert chat().chat(turns).message.role == "assistant"


@check
def error_400() -> None:
    error = raised(openai.BadRequestError, lambda: chat(additional_kwargs={"n": 2}).chat(ASK))
    assert error.param == "n"


contract.report()
