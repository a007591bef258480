"""Suites of task `rerank`: what CLIP finds, how an order of it is scored, and how a VLM is asked for one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from math import log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import GateError
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.vlm.generation import GenerationRequest
from serving.errors import EngineDead
from serving.http.rerank import judged
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.gate.builders import folder_dataset, picture
from updater.gate.clip import live_clip
from updater.gate.score import Scorer
from updater.gate.suites import MAX_RERANKED, Suite, load_suites
from updater.gate.vlm import HITS, FirstHits, VlmEvaluator


def hits(right: Sequence[Sequence[int]], most: Sequence[float]) -> FirstHits:
    found = np.array(right, bool)
    return FirstHits(["q"] * len(found), [["p"] * found.shape[1]] * len(found), found, np.array(most), [])


def test_the_score_is_the_discounted_gain_of_the_order_against_the_best_one() -> None:
    one, two = 1.0, 1.0 + 1 / log2(3)
    found = hits([[0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]], [one, two, one, two])
    odds = np.array([[0.1, 0.9, 0.2], [0.3, 0.2, 0.1], [3.0, 2.0, 1.0], [0.0, 1.0, 0.5]])
    assert found.ndcg(odds) == pytest.approx([1.0, (1 + 1 / 2) / two, 0.0, 1 / two])
    assert found.ndcg(-odds)[0] == pytest.approx(1 / 2), "right, and last of three"
    share = (1 + 1 / log2(3) + 1 / 2) / 3
    assert found.ndcg(None) == pytest.approx([share, 2 * share / two, 0.0, share / two])


@pytest.mark.parametrize("same", [0.0, np.nan, -np.inf])
def test_a_model_that_finds_all_hits_alike_has_the_worst_order(same: float) -> None:
    assert hits([[1, 0, 0]], [1.0]).ndcg(np.full((1, 3), same)) == pytest.approx([1 / 2])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder_dataset(tmp_path / "data" / "things", count=MAX_RERANKED + 30)
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "things.yaml").write_text("task: rerank\ndata: ${home}/data/things\nlimit: 5000\n")
    return tmp_path


def of(home: Path) -> Suite:
    (suite,) = load_suites([home / "suites"], home, "vlm")
    return suite


def test_a_suite_is_two_lines_for_the_vlm_over_captions_and_bounded(home: Path) -> None:
    suite = of(home)
    assert load_suites([home / "suites"], home, "clip") == []
    assert (suite.metric, len(suite.items()), suite.units()) == ("ndcg@10", MAX_RERANKED, MAX_RERANKED)
    item = suite.items()[0]
    assert item.text.startswith("thing number ") and item.asked == f"does this show {item.text}?"
    captions = suite.model_copy(update={"task": "retrieval", "metric": "recall@5"})
    assert captions.digest() != suite.digest()


def test_the_first_hits_are_those_of_the_clip_and_captions_that_pictures_share_are_one_query(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    with (tmp_path / "shared" / "data.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "text"])
        for number in range(30):
            (tmp_path / "shared" / f"{number}.png").write_bytes(picture(number))
            rows.writerow([f"{number}.png", f"kind {number % 3}"])
    suite = Suite(name="shared", task="rerank", data=str(tmp_path / "shared"))
    scorer = Scorer(ClipEngine(tiny_base(tmp_path), threads=1))
    found = FirstHits.of(suite, scorer, None)
    assert found.texts == ["kind 0", "kind 1", "kind 2"] and found.right.shape == (3, HITS)
    by_source = {item.source: item for item in suite.items()}
    for text, sources, right in zip(found.texts, found.sources, found.right, strict=True):
        similarity = (scorer.texts([text], None) @ scorer.images(suite.items(), None).T)[0]
        nearest = [suite.items()[place].source for place in np.argsort(-similarity)[:HITS]]
        assert sources == nearest and [by_source[each].text == text for each in sources] == right.tolist()
    assert found.ndcg(found.right.astype(float)) == pytest.approx(
        [sum(1 / log2(2 + place) for place in range(row.sum())) / most
         for row, most in zip(found.right, found.most, strict=True)]
    )  # fmt: skip


class Engine:
    """A VLM that says yes by a number in the question, and counts what it is asked."""

    def __init__(self) -> None:
        self.engine = SimpleNamespace(base=SimpleNamespace(digest="v" * 64), kind="transformers")
        self.asked: list[GenerationRequest] = []
        self.failure: Exception | None = None

    def scores(
        self, asks: Sequence[GenerationRequest], choices: Sequence[Sequence[str]], adapter: str | None, label: str
    ) -> list[list[float]]:
        if self.failure is not None:
            raise self.failure
        self.asked += asks
        assert [tuple(each) for each in choices] == [("yes", "no")] * len(asks)
        return [[float(ask.images[0].mean()) * (-1 if adapter else 1), 0.0] for ask in asks]


def evaluator(engine: Engine, scorer: Scorer, cache: Path) -> VlmEvaluator:
    vlm: Any = engine
    serve: Any = None
    return VlmEvaluator(vlm, serve, lambda: (scorer, None), cache=cache)


def test_a_vlm_is_asked_as_the_server_asks_it_and_each_order_once(home: Path, tmp_path: Path) -> None:
    suite, engine, scorer = of(home), Engine(), Scorer(ClipEngine(tiny_base(tmp_path), threads=1))
    judge = evaluator(engine, scorer, tmp_path / "cache")
    first, other = judge.score(suite, None), judge.score(suite, "vlm-a")
    assert len(engine.asked) == judge.question_count == 2 * HITS * MAX_RERANKED
    found = FirstHits.of(suite, scorer, None)
    served = judged((found.texts[0], ("image", b"")), engine.asked[0].images)
    assert replace(engine.asked[0], images=()) == replace(served, images=())
    assert first.ids.tolist() == [item.id for item in suite.items()] and first.hits.shape == (MAX_RERANKED, 1)
    assert ((first.hits >= 0) & (first.hits <= 1)).all() and not np.array_equal(first.hits, other.hits)
    again = evaluator(Engine(), scorer, tmp_path / "cache")
    assert np.array_equal(again.score(suite, "vlm-a").hits, other.hits) and again.question_count == 0
    assert judge.chance(suite) == pytest.approx(
        np.mean([judge.chance(suite, [item]) for item in suite.items()])
    ) and 0 < judge.chance(suite) < 1  # fmt: skip


def test_an_engine_that_ends_while_it_reranks_is_no_fault_of_the_candidate(home: Path, tmp_path: Path) -> None:
    engine = Engine()
    engine.failure = EngineDead("out of memory.", "Look.")
    judge = evaluator(engine, Scorer(ClipEngine(tiny_base(tmp_path), threads=1)), tmp_path / "cache")
    with pytest.raises(GateError, match="ended while reranking for suite things"):
        judge.score(of(home), None)


def test_hits_are_those_of_the_live_clip_adapter_and_of_the_base_before_the_first_release(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    settings = Settings(home=tmp_path)
    settings = settings.model_copy(update={"base": settings.base.model_copy(update={"clip": base.name})})
    scorer, adapter = live_clip(settings)
    assert adapter is None and scorer.engine.base.digest == base.digest
    name = tiny_adapter(base, tmp_path / "artifacts" / "adapters" / "made", seed=1)
    (tmp_path / "artifacts" / "adapters" / "made").rename(tmp_path / "artifacts" / "adapters" / name)
    ledger = Ledger.open(settings.ledger)
    ledger.register_adapter(name, "clip", base.digest, "", "", {})
    ledger.commit_release(1, clip=name, vlm=None, actor="op", reason="first", proposal_id=None)
    ledger.close()
    scorer, adapter = live_clip(settings)
    assert adapter == name and name in scorer.engine.resident
