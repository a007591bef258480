"""Haystack's ranker of its integration ``cohere-haystack``."""

from __future__ import annotations

import cohere
import contract
from contract import check, raised
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker

DOCUMENTS = [Document(content=text, meta={"place": place}) for place, text in enumerate(contract.TEXTS)]


def ranker(model: str = "vlm", key: str = contract.KEY, top_k: int = 10) -> CohereRanker:
    server = contract.URL.removesuffix("/v1")
    return CohereRanker(model=model, top_k=top_k, api_key=Secret.from_token(key), api_base_url=server)


@check
def rerank() -> None:
    for count in (10, 1):
        found = ranker(top_k=count).run(query=contract.TEXTS[0], documents=DOCUMENTS)["documents"]
        rows = [(each.meta["place"], each.score) for each in found]
        contract.assert_ranked(rows, min(count, len(DOCUMENTS)))


@check
def error_401() -> None:
    wrong = ranker(key=contract.WRONG_KEY)
    raised(cohere.UnauthorizedError, lambda: wrong.run(query="q", documents=DOCUMENTS))


@check
def error_404() -> None:
    raised(cohere.NotFoundError, lambda: ranker("gpt").run(query="q", documents=DOCUMENTS))


@check
def error_400() -> None:
    empty = [*DOCUMENTS, Document(content="")]
    error = raised(cohere.BadRequestError, lambda: ranker().run(query="q", documents=empty))
    assert error.body["error"]["param"] == f"documents.{len(DOCUMENTS)}"


contract.report()
