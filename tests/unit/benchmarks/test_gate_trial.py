from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from benchmarks.gate.bench import Extent, measure
from benchmarks.gate.cases import Judged, Rule
from benchmarks.gate.engine import LateEngine
from benchmarks.gate.margin import scaled as scaled_plan
from benchmarks.gate.mislabelled import measure as measure_mislabelled
from benchmarks.gate.plans import KNOWN, NEW, GatePlan, plans_mislabelled
from benchmarks.gate.population import Population
from benchmarks.gate.stock import stored, trained
from benchmarks.gate.training_data import exchanged, pairs, pools, reserved
from benchmarks.gate.trial import Workshop, fresh
from core.errors import AdapterError, ConfigError
from core.settings.updates import Gate
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from streams.publish.folders import read_folder
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.builders import recipe, run
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.suites import Suite
from updater.training.checkpoint import write_json
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


@pytest.fixture
def workshop(base: ClipBase, home: Path, tmp_path: Path) -> Workshop:
    held = Suite(name="held", task="retrieval", data=str(home / "data" / KNOWN[0]), limit=15)
    gain = fresh(home, NEW[0]).model_copy(update={"split": None})
    return Workshop(home, base, [Population.of(held), Population.of(gain)], tmp_path / "out")


def short(name: str, incumbent: str = "") -> GatePlan:
    small = recipe("naive", image=LAST, text=LAST, max_steps=2, reference_limit=0)
    return GatePlan(name, "naive", small, NEW[0], new=12, seed=1, incumbent=incumbent)


@pytest.mark.long
def test_a_short_run_says_all_and_trains_nothing_twice(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models on forty pictures: the figures mean nothing."""
    monkeypatch.setattr("benchmarks.gate.power.SIZES", (20,))
    wanted = [short("one"), replace(short("first-00"), kind="first"), replace(short("drift-00"), kind="drift")]
    extent, rule = Extent(1, 1, 1, 1, 2, 2, 0), Rule.of(Gate(min_items=5))

    def figures() -> dict:
        return measure(trained(workshop, wanted, 1, 1, rule), {}, extent, rule, workshop.out)

    first = figures()
    assert first["redrawn"]["deals"] >= 6
    assert {"false_accepts_at_margin", "false_rejects_gain3", "drift_caught_before_harm"} <= first.keys()
    assert len(list((workshop.out / "outcomes").glob("onex*.npz"))) <= 5
    monkeypatch.setattr(TRAIN, Mock(side_effect=AssertionError("trained again")))
    timed = dict.fromkeys(("seconds", "machine"))
    assert figures() | timed == first | timed
    trials = [workshop.of_scaled(scaled_plan(wanted[0], 0.5), wanted[0]) for _ in range(2)]
    assert trials[0].adapter == trials[1].adapter != workshop.of(wanted[0], None).adapter


def test_stored_outcomes_are_judged_without_training(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rule = Rule.of(Gate(min_items=5))
    wanted = [short("naive-00"), replace(short("drift-00"), kind="drift")]
    now = trained(workshop, wanted, 1, 1, rule)
    for name in ("train", "load_base"):
        monkeypatch.setattr(f"benchmarks.gate.trial.{name}", Mock(side_effect=AssertionError("needs no model")))
    suites = [one.suite for one in workshop.populations.values()]
    monkeypatch.setattr("benchmarks.gate.stock.load_suites", Mock(return_value=suites[:1]))
    monkeypatch.setattr("benchmarks.gate.stock.NEW", NEW[:1])
    folder = workshop.out / "outcomes"
    with pytest.raises(ConfigError, match="does not say how many items"):
        stored(folder, wanted, 1, rule)
    items = {name: [one.served, one.shown, one.everything] for name, one in now.items.items()}
    write_json(workshop.out / "results.json", {"items": items})
    kept = stored(folder, wanted, 1, rule)
    assert kept.items == now.items and [case.name for case in kept.cases] == ["naive-00", "drift-00"]
    assert sorted(case.name for case in kept.margin) == sorted(case.name for case in now.margin)
    for before, after in zip(now.cases, kept.cases, strict=True):
        assert before.judged == after.judged and before.excess(rule) == after.excess(rule)
    write_json(workshop.out / "results.json", {"items": {**items, "held": [1, 1, 7]}})
    with pytest.raises(ConfigError, match="holds no outcomes of the base"):
        stored(folder, wanted, 1, rule)


def test_false_labels_are_the_same_in_pairs_and_held_out_items_and_exchange_whole_classes(tmp_path: Path) -> None:
    folder = folder_dataset(tmp_path / "data" / NEW[0], count=60, split="train")
    false = exchanged(folder)
    true = {row.path.name: row.text for row in read_folder(folder)}
    assert sorted(false.values()) == sorted(true.values()) and sum(false[name] == true[name] for name in true) < 20
    alone = recipe("naive", reference_limit=0, mixture={"reference": 0.0, "new": 1.0, "replay": 0.0})
    own = pools(replace(plans_mislabelled(1)[0], domain=NEW[0], new=9, recipe=alone), tmp_path)
    assert own.new and all(pair.text == false[pair.id.partition("/")[2]] for pair in own.new)
    suite = Suite(name="things", task="retrieval", data=str(folder), split="train", limit=15)
    population = Population.of(suite, false)
    for gallery in population.galleries:
        assert all(item.text == false[Path(item.name).name] for item in gallery.suite.items())


def test_a_mislabelled_gain_is_released_only_if_the_base_agrees_with_the_labels(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = Judged("passed", (), True, None)
    monkeypatch.setattr("benchmarks.gate.mislabelled.judge", Mock(return_value=passed))
    for agrees in (True, False):
        monkeypatch.setattr(
            "benchmarks.gate.mislabelled.agreement", Mock(return_value=Mock(p_superior=0.001 if agrees else 0.4))
        )
        found = measure_mislabelled(workshop, [short("mislabelled-00")], Rule.of(Gate(min_items=5)))
        assert (found["passed"], found["of"], found["released"]) == (1, 1, int(agrees))
