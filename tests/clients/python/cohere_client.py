"""Cohere's client, for its rerank call."""

from __future__ import annotations

import cohere
import contract
from contract import check, raised

SERVER = contract.URL.removesuffix("/v1")
client = cohere.ClientV2(api_key=contract.KEY, base_url=SERVER)


@check
def rerank() -> None:
    answer = client.rerank(model="vlm", query=contract.TEXTS[0], documents=contract.TEXTS)
    contract.assert_ranked([(each.index, each.relevance_score) for each in answer.results])
    first = client.rerank(model="vlm", query=contract.TEXTS[0], documents=contract.TEXTS, top_n=1).results
    contract.assert_ranked([(each.index, each.relevance_score) for each in first], 1)
    older = cohere.Client(api_key=contract.KEY, base_url=SERVER).rerank(
        model="vlm", query=contract.TEXTS[0], documents=contract.TEXTS, return_documents=True
    )
    assert [each.document.text for each in older.results if each.document] == [  # type: ignore[union-attr]
        contract.TEXTS[each.index] for each in older.results
    ]


@check
def error_401() -> None:
    wrong = cohere.ClientV2(api_key=contract.WRONG_KEY, base_url=SERVER)
    raised(cohere.UnauthorizedError, lambda: wrong.rerank(model="vlm", query="q", documents=["d"]))


@check
def error_404() -> None:
    raised(cohere.NotFoundError, lambda: client.rerank(model="gpt", query="q", documents=["d"]))


@check
def error_400() -> None:
    error = raised(cohere.BadRequestError, lambda: client.rerank(model="vlm", query="q", documents=["d", ""]))
    assert error.body["error"]["param"] == "documents.1"


contract.report()
