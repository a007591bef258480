"""The blocking facade of an engine: replies and scores in the order in which they were asked."""

from __future__ import annotations

import pytest

from core.settings.serving import Serve
from serving.engines.vlm.open import SyncVlm, open_engine
from tests.integration.engines.conftest import VlmCases

pytestmark = pytest.mark.integration


def test_a_blocking_facade_gives_replies_and_scores_in_order(cases: VlmCases) -> None:
    name = cases.names[1]
    with SyncVlm(open_engine(cases.base, Serve(), kind="transformers")) as vlm:
        vlm.load(name, cases.directories[name])
        replies = vlm.replies(cases.asks, name, label="answers")
        assert [reply.tokens for reply in replies] == [one.tokens for one in cases.references[name]]
        scores = vlm.scores(cases.asks[:2], [["yes", "no"], ["red"]], name)
        wanted = [[cases.models[name].score(cases.asks[0], one) for one in ("yes", "no")]]
        wanted.append([cases.models[name].score(cases.asks[1], "red")])
        assert scores == [pytest.approx(one, abs=1e-4) for one in wanted]
        assert vlm.golden(name) != vlm.golden(None)
        vlm.unload(name)
        assert vlm.engine.resident() == frozenset()
    assert vlm.engine.last_error() == "The engine was closed."
