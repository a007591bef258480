from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from benchmarks.gate.bench import Extent, measure
from benchmarks.gate.cases import Rule, has_ranks
from benchmarks.gate.engine import LateEngine
from benchmarks.gate.margin import scaled as scaled_plan
from benchmarks.gate.plans import KNOWN, NEW, GatePlan, plans
from benchmarks.gate.population import Population
from benchmarks.gate.scaling import write_scaled
from benchmarks.gate.training_data import NOTHING, pairs, pools, reserved
from benchmarks.gate.trial import Workshop, fresh, run_all
from core.errors import AdapterError, RatchetError, TrainingError
from core.settings.updates import Gate
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from streams.publish.folders import read_folder
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.builders import recipe, run
from tests.unit.updater.gate.builders import folder_dataset
from updater.adapters import read_delta
from updater.gate.score import Scorer
from updater.gate.suites import Suite
from updater.training.result import TrainResult

LAST = {"blocks": 1}
TRAIN = "benchmarks.gate.trial.train"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for domain in {*NEW, *KNOWN}:
        folder_dataset(home / "data" / domain, split="train")
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> ClipBase:
    return tiny_base(home)


@pytest.fixture(scope="module")
def late(base: ClipBase, home: Path) -> TrainResult:
    return run(base, home / "late", recipe=recipe(image=LAST, text=LAST))


def test_kept_boundaries_change_no_vector(base: ClipBase, late: TrainResult, tmp_path: Path) -> None:
    plain, quick = ClipEngine(base), LateEngine(base)
    for engine in (plain, quick):
        engine.load(late.adapter, late.directory)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    texts = ["a red car", "a house", "two trees beside a long road", "a red car"]
    base_first = quick.encode_texts(texts[::-1], None)
    assert np.allclose(base_first, plain.encode_texts(texts[::-1], None), atol=1e-5)
    for rows in ([0, 1, 2, 3, 4, 5], [4, 0, 4], [5]):  # the later ones are known
        for adapter in (None, late.adapter):
            expected = plain.encode_images(pixels[rows], adapter)
            assert np.allclose(quick.encode_images(pixels[rows], adapter), expected, atol=1e-5)
    moved = quick.encode_texts(texts, late.adapter)
    assert np.allclose(moved, plain.encode_texts(texts, late.adapter), atol=1e-5)
    assert not np.allclose(moved, base_first[::-1], atol=1e-4), "the adapter does change them"
    early = tiny_adapter(base, tmp_path / "early", seed=1)
    with pytest.raises(AdapterError, match="before the last ones"):
        quick.load(early, tmp_path / "early")
    assert early not in quick.resident
    with pytest.raises(AdapterError, match="not resident"):
        quick.encode_texts(["a"], early)


@pytest.mark.parametrize("limit", [15, 40, 60])
def test_every_item_is_asked_once_and_the_first_are_the_suites_own(base: ClipBase, home: Path, limit: int) -> None:
    suite = Suite(name="things", task="retrieval", data=str(home / "data" / NEW[0]), limit=limit)
    population = Population.of(suite)
    assert population.n == population.held_out == 40 and population.shown == 26
    asked = [i.id for g in population.galleries for i, own in zip(g.suite.items(), g.counted, strict=True) if own]
    assert len(set(asked)) == len(asked) == 40
    assert {len(gallery.suite.items()) for gallery in population.galleries} == {min(limit, 40)}
    scorer = Scorer(ClipEngine(base))
    ranks = population.ranks(scorer, None)
    assert ranks.shape == (40, 2)
    assert np.array_equal(ranks[: min(limit, 40)], scorer.score(suite, None).ranks)


def test_what_no_candidate_trains_on_is_asked_besides_the_suites_own_items(base: ClipBase, tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / NEW[0], count=60, split="train")
    text = (folder / "data.csv").read_text().splitlines()
    (folder / "data.csv").write_text("\n".join(line.replace("train", "test") if i % 3 == 1 else line
                                               for i, line in enumerate(text)) + "\n")  # fmt: skip
    suite = Suite(name="things", task="retrieval", data=str(folder), split="test", limit=15)
    population = Population.of(suite)
    asked = [i.name for g in population.galleries for i, own in zip(g.suite.items(), g.counted, strict=True) if own]
    trained = {row.path.name for row in read_folder(folder, "train") if not reserved(row)}
    assert population.held_out == 20 and len(asked) == len(set(asked)) == population.n == 60 - len(trained)
    assert 5 < len(trained) < 35 and not trained & set(asked)
    assert {pair.id.split("/")[1] for pair in pairs(tmp_path, NEW[0], 60, np.random.default_rng(0))} == trained


def plan(lie: str) -> GatePlan:
    found = next(plan for plan in plans(40, 40) if plan.lie == lie)
    return replace(found, new=20, share=0.6 if found.share else 0.0)


def test_lies_are_about_the_pictures_that_they_should_be_about(home: Path) -> None:
    truth = {i: f"thing number {i}" for i in range(40)}
    drawn = {lie: pools(plan(lie), home) for lie in ("", "shuffled", "poisoned", "forgotten")}

    def honest(lie: str, domain: str = "") -> list[bool]:
        return [
            pair.text == truth[int(pair.id.split("/")[1].split(".")[0])]
            for pair in drawn[lie].new
            if pair.id.startswith(domain)
        ]

    assert all(honest(""))
    assert sum(honest("shuffled")) < 5
    for lie in ("poisoned", "forgotten"):
        assert all(honest(lie, plan(lie).domain)) and not all(honest(lie))
    victim = plan("forgotten").victim
    assert {pair.text for pair in drawn["forgotten"].new if pair.id.startswith(victim)} == {NOTHING}
    assert not any(pair.id.startswith(victim) for pair in drawn["forgotten"].reference)
    assert len({pair.text for pair in drawn["poisoned"].new}) > 10
    assert drawn["poisoned"].digest == pools(plan("poisoned"), home).digest


@pytest.fixture
def workshop(base: ClipBase, home: Path, tmp_path: Path) -> Workshop:
    held = Suite(name="held", task="retrieval", data=str(home / "data" / KNOWN[0]), limit=15)
    gain = fresh(home, NEW[0]).model_copy(update={"split": None})
    return Workshop(home, base, [held, gain], tmp_path / "out")


def short(name: str, incumbent: str = "") -> GatePlan:
    small = recipe("naive", image=LAST, text=LAST, max_steps=2, reference_limit=0)
    return GatePlan(name, "naive", small, NEW[0], new=12, seed=1, incumbent=incumbent)


def test_a_killed_run_goes_on_from_the_kept_outcomes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [short("one"), short("two", incumbent="one")]
    first = run_all(workshop, wanted)
    assert workshop.engine.resident == ()
    monkeypatch.setattr(TRAIN, Mock(side_effect=AssertionError("trained again")))
    suites = [population.suite for population in workshop.populations.values()]
    again = run_all(Workshop(workshop.home, workshop.base, suites, workshop.out), wanted)
    for name, trial in first.items():
        assert again[name].adapter == trial.adapter
        assert all(np.array_equal(again[name].answers[suite], kept) for suite, kept in trial.answers.items())
    assert first["two"].adapter != first["one"].adapter
    assert all(has_ranks(kept) for trial in again.values() for kept in trial.answers.values())
    with pytest.raises(AssertionError, match="trained again"):
        workshop.of(replace(wanted[0], new=13), None)  # another plan of that name


def test_what_training_refuses_is_kept_as_such(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRAIN, Mock(side_effect=TrainingError("the loss of step 3 is nan")))
    found = run_all(workshop, [short("one")])["one"]
    assert found.error == "the loss of step 3 is nan" and not found.answers
    assert workshop.of(short("one"), None) == found
    with pytest.raises(RatchetError, match="two goes on from one"):
        run_all(workshop, [short("one"), short("two", incumbent="one")])


def test_half_of_a_change_is_half_of_it_in_every_layer(base: ClipBase, late: TrainResult, tmp_path: Path) -> None:
    assert write_scaled(late.directory, base, 0.5, tmp_path / "half") != late.adapter
    whole, half = (read_delta(place, base) for place in (late.directory, tmp_path / "half"))
    assert whole and half.keys() == whole.keys()
    for layer, factor in whole.items():
        assert np.allclose(half[layer].dense(), 0.5 * factor.dense(), atol=1e-7)


def test_a_short_run_says_all_and_trains_nothing_twice(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models on forty pictures: the figures mean nothing."""
    monkeypatch.setattr("benchmarks.gate.power.SIZES", (20,))
    wanted = [short("one"), replace(short("first-00"), kind="first"), replace(short("drift-00"), kind="drift")]
    extent, rule = Extent(1, 1, 1, 1, 2, 2), Rule.of(Gate(min_items=5))
    first = measure(workshop, wanted, extent, rule)
    assert first["redrawn"]["deals"] >= 6
    assert {"false_accepts_at_margin", "false_rejects_gain3", "drift_caught_before_harm"} <= first.keys()
    assert len(list((workshop.out / "outcomes").glob("onex*.npz"))) <= 5
    monkeypatch.setattr(TRAIN, Mock(side_effect=AssertionError("trained again")))
    timed = dict.fromkeys(("seconds", "machine"))
    assert measure(workshop, wanted, extent, rule) | timed == first | timed
    trials = [workshop.of_scaled(scaled_plan(wanted[0], 0.5), wanted[0]) for _ in range(2)]
    assert trials[0].adapter == trials[1].adapter != workshop.of(wanted[0], None).adapter
