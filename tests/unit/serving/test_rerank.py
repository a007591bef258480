"""Reranking over the real application; the model is scripted: it says yes as a document's text or picture tells it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, cast

import numpy as np
import pytest

from core.access import Principal
from core.ledger.rows import KeyScope
from serving.catalog.queries import Found, Hit, Search
from serving.engines.vlm.generation import GenerationRequest
from serving.errors import InvalidRequest, QueueFull
from serving.http.app_state import AppState
from serving.http.auth import AuthMiddleware
from serving.http.clip_vectors import Vectors
from serving.messages import IMAGES_PER_REQUEST, TEXTS_PER_REQUEST
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.scripted_vlms import SETTINGS, ScriptedVlms, app_state, client, png, uri

RED, DARK = uri(png(colour=(250, 0, 0))), uri(png(colour=(10, 0, 0)))
IDS = [f"{number:x}" * 64 for number in range(1, 5)]


@dataclass
class Judge(ScriptedVlms):
    """Says yes to red pictures, and to texts by the number at their end. Counts the pairs that it has at once."""

    most: int = 0
    inside: int = 0
    prompts: list[Any] = field(default_factory=list)

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        self.asked.append((ask, snapshot))
        self.choices = list(choices)
        text = ask.messages[-1].content[-1]
        if self.failure is not None and isinstance(text, str) and text.endswith("!"):
            raise self.failure
        yes = (
            float(text.split()[-1]) if len(ask.messages) == 2 and isinstance(text, str) else ask.images[-1].max() / 255
        )
        return [math.log(max(yes, 1e-9)), math.log(max(1 - yes, 1e-9))]


class Catalog:
    """Finds the samples of :data:`IDS` in their order: the first is dark, the last is not there any more."""

    images: ClassVar = dict(zip(IDS, (png(colour=(10, 0, 0)), png(colour=(250, 0, 0)), b"broken"), strict=False))

    async def image(self, sample_id: str) -> bytes | None:
        return self.images.get(sample_id)

    async def search(self, space: str, search: Search) -> Found:
        time = datetime(2024, 1, 1, tzinfo=UTC)
        hits = [Hit(each, 0.9 - 0.1 * place, "t", "d", "s", time) for place, each in enumerate(IDS)]
        return Found([hits[: search.k]])


class Encoded:
    async def of_texts(self, texts: Sequence[str], *_: Any) -> Any:
        return Vectors(np.zeros((1, 8), np.float32), 1.0, 0)

    of_images = of_texts


def state_of(vlms: ScriptedVlms | None) -> AppState:
    state = replace(app_state(vlms, SETTINGS), index=cast(Any, Catalog()))
    state.__dict__["vectors"] = Encoded()  # in place of the cached property
    return state


async def post(vlms: ScriptedVlms | None, path: str = "/v1/rerank", **body: Any) -> Any:
    async with client(state_of(vlms)) as http:
        return await http.post(path, json=body)


TEXTS = ["a cat 0.2", "a dog 0.9", "a cow 0.5"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_come_in_the_order_of_the_probability_of_yes_all_by_one_release(path: str) -> None:
    vlms = Judge()
    answer = await post(vlms, path, query="which barks?", documents=TEXTS, rank_fields=["text"], max_tokens_per_doc=9)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], answer.headers["x-ratchet-release"], answer.headers["x-ratchet-adapter"]) == (
        "vlm@3", "3", "vlm-b",
    )  # fmt: skip
    assert [row["index"] for row in body["results"]] == [1, 2, 0]
    assert [row["relevance_score"] for row in body["results"]] == pytest.approx([0.9, 0.5, 0.2])
    assert all("document" not in row for row in body["results"])
    assert {(snapshot.release, snapshot.vlm) for _, snapshot in vlms.asked} == {(3, "vlm-b")}
    assert vlms.choices == ["yes", "no"]
    judge, asked = vlms.asked[0][0].messages
    assert judge.role == "system" and asked.content[1:] == ("which barks?", "\n<Document>:", "a cat 0.2")


async def test_the_first_n_come_with_what_was_sent() -> None:
    documents = [{"text": "x 0.1"}, {"type": "image_url", "image_url": {"url": RED}}, "y 0.7", {"id": IDS[1]}]
    answer = await post(Judge(), query={"image": DARK}, documents=documents, top_n=3, return_documents=True)
    assert answer.status_code == 200, answer.text
    rows = answer.json()["results"]
    assert [row["index"] for row in rows] == [1, 3, 2], "of equal ones the first of the request"
    assert [row["document"] for row in rows] == [documents[1], documents[3], {"text": "y 0.7"}]


async def test_a_picture_for_a_text_is_asked_about_as_the_vlm_was_taught_and_a_pair_of_pictures_in_their_order() -> (
    None
):
    vlms = Judge()
    assert (await post(vlms, query="a red square", documents=[{"image": RED}])).status_code == 200
    assert (await post(vlms, query={"image": DARK}, documents=[{"image": RED}])).status_code == 200
    (about, _), (pair, _) = vlms.asked
    assert about.messages[0].content[0] == 0 and "a red square" in str(about.messages[0].content[1])
    assert [each for each in pair.messages[1].content if isinstance(each, int)] == [0, 1]
    assert [image.max() for image in pair.images] == [10, 250]


async def test_only_a_batch_of_pairs_is_asked_at_once() -> None:
    vlms = Judge(limit=16)
    assert (await post(vlms, query="q", documents=["x 0.5"] * 40)).status_code == 200
    assert (vlms.most, len(vlms.asked)) == (2, 40)


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"documents": []}, 400, "documents"), ({"documents": ["x"] * (TEXTS_PER_REQUEST + 1)}, 400, "documents"),
    ({"documents": [{"image": RED}] * (IMAGES_PER_REQUEST + 1)}, 400, "documents"), ({"top_n": 0}, 400, "top_n"),
    ({"documents": ["x 0.1", ""]}, 400, "documents.1"), ({"query": ""}, 400, "query"),
    ({"query": "x" * 2001}, 400, "query"), ({"documents": [5]}, 400, "documents.0"),
    ({"documents": [{"image": "data:image/png;base64,AAAA"}]}, 400, "documents.0.image"),
    ({"documents": [{"image": "https://example.org/a.png"}]}, 400, "documents.0.image"),
    ({"documents": [{"id": "7"}]}, 400, "documents.0.id"), ({"documents": [{"id": IDS[3]}]}, 404, "documents.0.id"),
    ({"documents": ["x 0.1", {"id": IDS[2]}]}, 404, "documents.1.id"), ({"model": "gpt"}, 404, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "status", "param"), REFUSED)
async def test_what_cannot_be_judged_is_refused_by_its_place(wrong: dict[str, Any], status: int, param: str) -> None:
    answer = await post(Judge(), **{"query": "q", "documents": ["x 0.1"]} | wrong)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error


async def test_a_document_that_is_too_long_for_the_vlm_is_named_and_a_full_queue_is_429() -> None:
    long = await post(Judge(failure=InvalidRequest("999 tokens.", "Shorten it.")), query="q", documents=["x 0.1", "y!"])
    assert (long.status_code, long.json()["error"]["param"]) == (400, "documents.1")
    assert "999 tokens" in long.json()["error"]["message"]
    full = await post(Judge(failure=QueueFull("full.")), query="q", documents=["x 0.1", "y!"])
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")


async def test_without_a_vlm_reranking_says_how_to_get_one() -> None:
    reranks, searches = {"query": "q", "documents": ["x"]}, {"text": "q", "rerank": 2}
    for path, body, param in (("/v1/rerank", reranks, "model"), ("/v1/search", searches, "rerank")):
        error = (await post(None, path, **body)).json()["error"]
        assert (error["code"], error["param"]) == ("no_vlm", param)
        assert "base.vlm" in error["message"]


async def test_a_search_has_its_first_hits_ordered_by_the_vlm_of_its_release_and_is_as_before_without() -> None:
    vlms = Judge()
    plain = (await post(vlms, "/v1/search", text="a red square")).json()["data"]
    assert [hit["id"] for hit in plain] == IDS and "relevance_score" not in plain[0] and vlms.asked == []
    answer = await post(vlms, "/v1/search", text="a red square", rerank=2)
    hits = answer.json()["data"]
    assert [hit["id"] for hit in hits] == [IDS[1], IDS[0], IDS[2], IDS[3]]
    assert [hit.get("relevance_score") for hit in hits] == pytest.approx([250 / 255, 10 / 255, None, None])
    assert answer.headers["x-ratchet-release"] == "3"
    assert {(snapshot.clip, snapshot.vlm) for _, snapshot in vlms.asked} == {("clip-a", "vlm-b")}


async def test_hits_that_were_deleted_or_cannot_be_read_follow_those_that_the_vlm_saw() -> None:
    hits = (await post(Judge(), "/v1/search", image=RED, rerank=4, k=4)).json()["data"]
    assert [hit["id"] for hit in hits] == [IDS[1], IDS[0], IDS[2], IDS[3]]
    assert ["relevance_score" in hit for hit in hits] == [True, True, False, False]


@pytest.mark.parametrize(
    ("scopes", "path", "body", "lacks"),
    [
        (("infer",), "/v1/rerank", {"query": "q", "documents": [{"id": IDS[1]}]}, "search"),
        (("search",), "/v1/search", {"text": "q", "rerank": 1}, "infer"),
        (("infer",), "/v1/rerank", {"query": "q", "documents": ["x 0.1"]}, ""),
        (("infer", "search"), "/v1/rerank", {"query": "q", "documents": [{"id": IDS[1]}]}, ""),
        (("infer", "search"), "/v1/search", {"text": "q", "rerank": 1}, ""),
        (("search",), "/v1/search", {"text": "q"}, ""),
    ],
)
async def test_a_key_needs_both_scopes_where_samples_are_judged(
    scopes: tuple[KeyScope, ...], path: str, body: Any, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def admit(*_: Any) -> Principal:
        return Principal("bot", frozenset(scopes))

    monkeypatch.setattr(AuthMiddleware, "_admit", admit)
    vlms = Judge()
    answer = await post(vlms, path, **body)
    assert answer.status_code == (403 if lacks else 200), answer.text
    if lacks:
        assert answer.json()["error"]["code"] == "insufficient_scope" and f"`{lacks}`" in answer.text
        assert vlms.asked == []
