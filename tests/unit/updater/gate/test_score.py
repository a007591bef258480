from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from core.artifacts import Artifacts
from core.errors import AdapterError, GateError
from serving.engines.bridge import bridge_key, parse_bridge
from serving.engines.clip import ClipEngine
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.gate.builders import folder_dataset, fresh_suite, sample_rows
from updater.gate.clip import AcrossBasesEvaluator, ClipEvaluator, base_alone
from updater.gate.cross_version import store_bridge
from updater.gate.gate_command import PrecisionScore, precision_scores
from updater.gate.score import Scorer, rank_of_best
from updater.gate.suite_items import Item
from updater.gate.suites import Suite, load_suites


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def engine(home: Path) -> ClipEngine:
    return ClipEngine(tiny_base(home), threads=1)


def suite_of(home: Path, data: str, more: str = "task: retrieval\n", count: int = 40) -> Suite:
    """A suite over a folder that is made unless it is there."""
    if not (home / "data" / data).exists():
        folder_dataset(home / "data" / data, count)
    file = home / f"{data}.yaml"
    file.write_text(more + f"data: ${{home}}/data/{data}\n")
    return load_suites([file], home)[0]


@pytest.fixture(scope="module")
def suite(home: Path) -> Suite:
    return suite_of(home, "things")


@pytest.mark.parametrize(
    ("similarity", "right", "ranks"),
    [
        ([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5]], [[0, 0, 1], [1, 0, 0]], [1, 0]),
        ([[0.9, 0.8, 0.95, 0.1], [0.9, 0.8, 0.95, 0.1]], [[1, 1, 0, 0], [1, 0, 1, 0]], [1, 0]),
        (np.ones((6, 6)), np.eye(6), [5] * 6),
        (np.full((6, 6), np.nan), np.eye(6), [5] * 6),
    ],
    ids=["wrong answers that are not below", "the best of several right ones", "a collapsed model", "a model of NaN"],
)
def test_the_rank_counts_wrong_answers_not_below_the_best_right(similarity: Any, right: Any, ranks: list[int]) -> None:
    assert rank_of_best(np.array(similarity), np.array(right, dtype=bool)).tolist() == ranks


def test_classification_compares_with_the_mean_of_normalised_templates(home: Path, engine: ClipEngine) -> None:
    how = 'task: classification\ntemplates: ["{}", "a {} here"]\nnames: {kind_1: a dog}\n'
    suite = suite_of(home, "kinds", how, count=8)
    outcomes = Scorer(engine).score(suite, None)
    names = ["kind 0", "a dog", "kind 2", "kind 3"]
    heads = np.stack([engine.encode_texts([n, f"a {n} here"]).mean(axis=0) for n in names])
    heads /= np.linalg.norm(heads, axis=1, keepdims=True)
    pixels = np.stack([engine.base.preprocess.pixels(item.read()) for item in suite.items()])
    expected = (engine.encode_images(pixels) @ heads.T).argmax(axis=1)
    assert outcomes.answers[:, 0].tolist() == expected.tolist()
    truth = [int(item.text[-1]) for item in suite.items()]
    assert outcomes.hits[:, 0].tolist() == [float(a == b) for a, b in zip(expected, truth, strict=True)]


def test_retrieval_ranks_match_a_plain_computation_and_equal_captions_are_each_others_hits(engine: ClipEngine) -> None:
    suite = fresh_suite(sample_rows(24, texts=[f"t{i // 2}" for i in range(24)]))
    outcomes = Scorer(engine).score(suite, None)
    pixels = np.stack([engine.base.preprocess.pixels(item.read()) for item in suite.items()])
    own = [item.text for item in suite.items()]
    texts = sorted(set(own))
    by_text = engine.encode_images(pixels) @ engine.encode_texts(texts).T
    for i, text in enumerate(own):
        to_images = by_text[:, texts.index(text)]
        best = max(score for score, other in zip(to_images, own, strict=True) if other == text)
        assert outcomes.ranks[i, 0] == np.sum(by_text[i] > by_text[i, texts.index(text)])
        assert outcomes.ranks[i, 1] == np.sum(to_images > best)


def test_scores_are_kept_on_disk_unless_they_are_damaged(home: Path, engine: ClipEngine, suite: Suite) -> None:
    first = Scorer(engine, home / "kept").score(suite, None)
    (file,) = (home / "kept").glob("*.npz")
    for damage in (None, b"", b"not a zip", file.read_bytes()[:200]):
        if damage is not None:
            file.write_bytes(damage)
        scorer = Scorer(engine, home / "kept")
        again = scorer.score(suite, None)
        assert np.array_equal(first.ranks, again.ranks) and np.array_equal(first.answers, again.answers)
        assert bool(scorer._images) == (damage is not None), "a forward pass is made for damaged scores alone"


def test_an_adapter_has_its_own_scores_and_shares_its_towers(home: Path, engine: ClipEngine, suite: Suite) -> None:
    name = tiny_adapter(engine.base, home / "text-only", seed=4, towers=("text",))
    engine.load(name, home / "text-only")
    scorer = Scorer(engine, home / "towers")
    assert not np.array_equal(scorer.score(suite, None).ranks, scorer.score(suite, name).ranks)
    assert (len(scorer._images), len(scorer._texts)) == (1, 2)


def test_images_with_equal_names_are_not_mixed_up_and_embedded_once(home: Path, engine: ClipEngine) -> None:
    """Emoji sets name their files alike: the drawing decides, not the name."""
    one, two = (suite_of(home, name, count=6) for name in ("one", "two"))
    (two.folder / "0.png").write_bytes((one.folder / "5.png").read_bytes())
    scorer = Scorer(engine, home / "mixed")
    vectors = [scorer.images(suite.items(), None) for suite in (one, two)]
    assert [item.id for item in one.items()] == [item.id for item in two.items()]
    same = np.isclose(vectors[0], vectors[1]).all(axis=1)
    assert [item.text for item, equal in zip(one.items(), same, strict=True) if not equal] == ["thing number 0"]
    scorer.score(suite_of(home, "one", "task: classification\n"), None)
    assert [len(known) for known in scorer._images.values()] == [12]


def test_several_threads_score_as_one_does_and_leave_torch_as_it_was(engine: ClipEngine, suite: Suite) -> None:
    ranks = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scorer = Scorer(engine)
            ranks.append([scorer.images(suite.items(), None), scorer.texts(["a", "b"], None)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert all(np.array_equal(one, other) for one, other in zip(*ranks, strict=True))


def test_chance_is_what_random_answers_score(engine: ClipEngine) -> None:
    suite = fresh_suite(sample_rows(30, texts=[f"t{i // 3}" for i in range(30)]))
    rng = np.random.default_rng(0)
    own = np.array([int(item.text[1:]) for item in suite.items()])
    hits = []
    for _ in range(400):
        to_text = rank_of_best(rng.random((30, 10)), own[:, None] == np.arange(10)) < 5
        to_image = rank_of_best(rng.random((30, 30)), own[:, None] == own) < 5
        hits.append((to_text.mean() + to_image.mean()) / 2)
    # a rank below k allows k - 1 wrong answers above the best right one: k draws hold a right one
    assert Scorer(engine).chance(suite) == pytest.approx(np.mean(hits), abs=0.01)
    assert Scorer(engine).chance(fresh_suite(sample_rows(3))) == 1.0, "any order of three has the right one among five"


def test_an_unreadable_image_names_its_item(home: Path, engine: ClipEngine) -> None:
    broken = suite_of(home, "broken", count=4)
    (broken.folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    with pytest.raises(GateError, match=r"item 2\.png"):
        Scorer(engine).score(broken, None)


def test_a_precision_that_answers_otherwise_is_found(engine: ClipEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, images = fresh_suite(sample_rows(40)), ClipEngine.encode_images
    (row,) = precision_scores(engine.base, "bfloat16", [suite], threads=1)
    assert (row.suite, row.items) == ("fresh", 40)
    assert row.within_noise and row.noise > 0
    scores = [PrecisionScore("s", 100, 0.5, served, 0.05).within_noise for served in (0.54, 0.56)]
    assert scores == [True, False], "noise is the standard error of the score"

    def blurred(self: ClipEngine, pixels: Any, adapter: str | None = None) -> Any:
        vectors = images(self, pixels, adapter)
        return vectors if self.precision == "float32" else vectors[::-1].copy()

    monkeypatch.setattr(ClipEngine, "encode_images", blurred)
    (row,) = precision_scores(engine.base, "bfloat16", [suite], threads=1)
    assert row.served != row.float32


N, DIM = 120, 64


class GivenVectors:
    """Vectors of each model: an image and its text are equal but for noise; models differ by a rotation."""

    def __init__(self, turned: dict[str | None, float], folded: bool = False) -> None:
        """``turned``: share of another map in each model's space. ``folded``: one that is not linear."""
        self.turned, self.folded = turned, folded
        self.turn = np.linalg.qr(np.random.default_rng(9).normal(size=(DIM, DIM)))[0]
        self.engine = SimpleNamespace(spaces=lambda name: SimpleNamespace(image=f"space {turned[name]}"))

    def images(self, items: list[Item], adapter: str | None, label: str = "") -> np.ndarray:
        return self._vectors([item.text for item in items], adapter, 1)

    def texts(self, texts: list[str], adapter: str | None, label: str = "") -> np.ndarray:
        return self._vectors(texts, adapter, 2)

    def _vectors(self, texts: list[str], adapter: str | None, side: int) -> np.ndarray:
        content = np.stack([np.random.default_rng(int(text)).normal(size=DIM) for text in texts])
        noise = np.stack([np.random.default_rng([int(text), side]).normal(size=DIM) for text in texts])
        share = self.turned[adapter]
        vectors = (content + 0.3 * noise) @ ((1 - share) * np.eye(DIM) + share * self.turn)
        if share and self.folded:
            vectors = np.cos(2 * vectors)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def measure(candidate: float, margin: float = 0.05, folded: bool = False) -> Any:
    scorer: Any = GivenVectors({None: 0.0, "clip-new": candidate}, folded)
    suite = Suite(name="fresh", role="gain", task="retrieval", limit=N)
    suite._items = tuple(Item(f"i{n}", str(n), str(n), f"i{n}", f"i{n}", bytes) for n in range(N))
    return ClipEvaluator.cross_version(scorer, [suite], None, "clip-new", margin, 0.05)


def test_a_space_that_hardly_moved_may_be_searched_at_once_and_one_of_another_rotation_may_not() -> None:
    near, far = measure(0.02), measure(1.0)
    assert near.n == N and near.allowed
    assert near.new_old == pytest.approx(near.old_old, abs=0.02)
    assert far.new_old < 0.2 < far.new_new and not far.allowed
    assert far.summary()["allowed"] is False
    assert not measure(0.0001, margin=0.001).allowed, "few items prove nothing"
    assert measure(0.0) is None, "an update of the text tower alone has no such question"


def test_a_bridge_is_offered_where_it_keeps_the_recall_and_refused_where_it_does_not(tmp_path: Path) -> None:
    turned, folded = measure(1.0, margin=0.1), measure(1.0, margin=0.1, folded=True)
    assert turned.new_old < 0.2 and not turned.allowed
    assert turned.bridge.allowed and turned.bridge.recall == pytest.approx(turned.bridge.old_old, abs=0.1)
    assert turned.bridge.n < N, "it is judged on what it was not fitted on"
    assert folded.new_new > 0.9 and not folded.bridge.allowed, "no rotation maps one space to the other"
    assert turned.summary()["bridge"]["allowed"] is True and "matrix" not in turned.summary()["bridge"]
    artifacts = Artifacts(str(tmp_path))
    scorer: Any = GivenVectors({None: 0.0, "clip-new": 1.0})
    for measured in (turned, folded):
        verdict: Any = SimpleNamespace(incumbent=None, candidate="clip-new", cross_version=measured)
        store_bridge(artifacts, scorer, verdict)
        kept = parse_bridge(artifacts.read_bytes(bridge_key("space 0.0", "space 1.0")))
        assert np.array_equal(kept, turned.bridge.matrix), "what is refused is not stored"


def test_each_model_is_asked_on_its_base(tmp_path: Path) -> None:
    """Whole verdicts across bases: tests/integration/updater/test_base_upgrade.py."""
    old, new = tiny_base(tmp_path), tiny_base(tmp_path, "wide", seed=5, dim=48)
    incumbent = tiny_adapter(old, tmp_path / "incumbent", seed=1)
    candidate = tiny_adapter(new, tmp_path / "candidate", seed=2)
    evaluator = AcrossBasesEvaluator(ClipEngine(old, threads=1), ClipEngine(new, threads=1), candidate)
    with pytest.raises(AdapterError, match=r"belongs to the base 'tiny' .* this one is 'wide'"):
        evaluator.load(incumbent, tmp_path / "incumbent", candidate=True)
    evaluator.load(incumbent, tmp_path / "incumbent")
    evaluator.load(candidate, tmp_path / "candidate", candidate=True)
    suite = fresh_suite(sample_rows(30))
    plain = {base.name: ClipEvaluator(ClipEngine(base, threads=1)) for base in (old, new)}
    plain["tiny"].load(incumbent, tmp_path / "incumbent")
    plain["wide"].load(candidate, tmp_path / "candidate")
    for name, asked, base in (
        (candidate, candidate, "wide"), (None, None, "wide"), (incumbent, incumbent, "tiny"),
        (base_alone(old), None, "tiny"),
    ):  # fmt: skip
        ranks = evaluator.score(suite, name).ranks
        assert np.array_equal(ranks, plain[base].score(suite, asked).ranks)
    assert not np.array_equal(evaluator.score(suite, None).ranks, evaluator.score(suite, base_alone(old)).ranks)
