"""A request for embeddings of texts and images."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from serving.http.clip_vectors import Vectors
from serving.http.embeddings import embed


def test_texts_and_images_of_one_request_are_encoded_at_once() -> None:
    asked: list[str] = []
    both = asyncio.Event()

    async def of(kind: str, items: list[Any], rows: list[list[float]], cut: tuple[int, ...] = ()) -> Vectors:
        asked.append(kind)
        if len(asked) == 2:
            both.set()
        await asyncio.wait_for(both.wait(), 60)
        return Vectors(np.asarray(rows, np.float32), 7.0, 5 * len(items) * (kind == "text"), cut)

    vectors = SimpleNamespace(
        of_images=lambda items, *_: of("image", items, [[1, 0]]),
        of_texts=lambda items, *_: of("text", items, [[0, 1], [0, 2]], (1,)),
    )
    state: Any = SimpleNamespace(vectors=vectors, dim=2, check_texts=lambda *_, **__: None)
    snapshot: Any = None
    found = asyncio.run(embed(state, snapshot, ["a", ("input.1", b"png"), "b"], 60.0, "ann"))
    assert sorted(asked) == ["image", "text"]
    assert found.rows.tolist() == [[0, 1], [1, 0], [0, 2]]
    assert (found.tokens, found.cut, found.logit_scale) == (10, (2,), 7.0)
