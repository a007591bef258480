from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.continual import run_continual, tuning
from benchmarks.continual.chain import Chain, Unit, update_path, updates_done
from benchmarks.continual.evaluation import Encoded, Evaluator, Vectors
from benchmarks.continual.lead import leads
from benchmarks.continual.looks import left_out
from benchmarks.continual.outcomes import read_course, read_reference
from benchmarks.continual.plan import plan
from benchmarks.continual.plots import all_plots
from benchmarks.continual.protocol import BUDGETS, Protocol
from benchmarks.continual.report import ends, figures, read_chains
from benchmarks.continual.run_continual import Wanted
from benchmarks.continual.table import markdown
from benchmarks.continual.worker import clip_chain, trial_chain
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_base
from tests.unit.benchmarks.builders import PROTOCOL, stream
from tests.unit.updater.builders import pairs
from updater.recipes import load_recipe
from updater.training.workers import Stopped

METHODS = ("default", "locked-text")


@pytest.fixture(scope="module", autouse=True)
def untuned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tried", dict)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def results(base: ClipBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for name in METHODS:
        _chain(base, folder, name).run(2)
    return folder


def _chain(base: ClipBase, folder: Path, name: str = "default") -> Chain:
    return clip_chain(base, stream(), PROTOCOL, Unit(name), folder)


def _rows(folder: Path, name: str = "default") -> list[dict[str, Any]]:
    return updates_done(folder, load_recipe(name), Unit(name))


def _last_adapter(folder: Path, name: str = "default") -> Path:
    return Unit(name).folder(folder) / "adapters" / _rows(folder, name)[-1]["adapter"]


@pytest.mark.long
def test_every_method_gets_the_same_compute_and_uses_it_up(base: ClipBase, results: Path) -> None:
    for name in METHODS:
        for cost in (row["cost"] for row in _rows(results, name)):
            assert cost["gflops_spent"] <= PROTOCOL.gflops < cost["gflops_spent"] + cost["maf_per_step"]
    steps = {name: sum(row["cost"]["steps"] for row in _rows(results, name)) for name in METHODS}
    assert steps["locked-text"] > steps["default"] > 2


def test_a_schedule_keeps_its_shares_of_the_steps_that_are_paid_for_and_taken(base: ClipBase, tmp_path: Path) -> None:
    """Also with texts of a term's own: there are as many random strings per batch as for the whole update. This budget
    just pays for the third step.
    """
    recipe = load_recipe("default")
    made = plan(base, recipe, stream(), PROTOCOL, tmp_path)
    wanted = recipe.schedule.cooldown_steps * made.steps / recipe.max_steps
    assert made.recipe.schedule.cooldown_steps == max(1, round(wanted))
    assert made.recipe.schedule.warmup_steps >= 1
    assert plan(base, recipe, stream(), PROTOCOL, tmp_path) == made
    chain = clip_chain(base, stream(), replace(PROTOCOL, gflops=1.02), Unit("vr-lwf"), tmp_path)
    chain.run(1)
    (row,) = _rows(tmp_path, "vr-lwf")
    assert chain.plan.steps == row["cost"]["steps"] == 3


def test_a_stopped_chain_and_a_lost_update_end_alike(base: ClipBase, results: Path, tmp_path: Path) -> None:
    asked = count()
    with pytest.raises(Stopped):
        _chain(base, tmp_path).run(2, stop=lambda: next(asked) >= 6)
    assert len(_rows(tmp_path)) < 2
    _chain(base, tmp_path).run(2)
    again, whole = _rows(tmp_path), _rows(results)
    for key in ("adapter", "hits", "cross", "update"):
        assert [row[key] for row in again] == [row[key] for row in whole]
    folder = Unit("default").folder(tmp_path)
    assert [path.name for path in (folder / "adapters").iterdir()] == [whole[1]["adapter"]], "the last alone is kept"
    other_recipe = load_recipe("default").model_copy(update={"rank": 4})
    assert updates_done(tmp_path, other_recipe, Unit("default")) == [], "results of another one do not count"
    update_path(folder, 1).write_text("{")
    assert _rows(tmp_path) == []
    _chain(base, tmp_path).run(1)
    assert _rows(tmp_path)[0]["adapter"] == whole[0]["adapter"]


def test_a_trial_is_scored_after_its_last_update_alone(base: ClipBase, tmp_path: Path) -> None:
    plain, unit = stream(), Unit("default", trial=(0, 0))
    tuned = replace(plain, tuning_updates=plain.updates, tuning=plain.suites[:2])
    trial_chain(base, tuned, PROTOCOL, unit, tmp_path, updates=2).run(2)
    rows = updates_done(tmp_path, unit.recipe, unit)
    assert [set(row["hits"]) for row in rows] == [set(), {suite.name for suite in tuned.tuning}]


def test_an_encoding_from_the_boundary_is_the_serving_engines(base: ClipBase, results: Path, tmp_path: Path) -> None:
    """Under the base, an adapter of the last block, and one of all weights, in turns."""
    suites = stream().suites
    evaluator, engine = Evaluator(base, suites), ClipEngine(base, "cpu")
    _chain(base, tmp_path, "full").run(1)
    folders = [_last_adapter(results), _last_adapter(tmp_path, "full")]
    for folder in folders:
        engine.load(folder.name, folder)
    pair = suites[0].items[0]
    pixels = base.preprocess.pixels(pair.read())[None]
    for folder in (None, folders[0], folders[1], folders[0], None):
        name = folder.name if folder else None
        encoded = evaluator.encode(folder)
        assert np.allclose(encoded.images[pair.id], engine.encode_images(pixels, name)[0], atol=1e-5)
        assert np.allclose(encoded.texts[pair.text], engine.encode_texts([pair.text], name)[0], atol=1e-5)


def test_pictures_that_look_like_one_that_is_trained_on_are_left_out(tmp_path: Path) -> None:
    taught = pairs("car", 3)
    asked = {"boat": (*pairs("boat", 3), replace(taught[1], id="boat-again")), "tree": pairs("tree", 2)}
    for _ in range(2):  # the second time as it was kept
        assert left_out(tmp_path, taught, asked) == {"boat": ["boat-again"], "tree": []}


def _named(encoded: Encoded, image: str, prompts: dict[str, list[str]]) -> str:
    """The class with the nearest mean of its prompts."""

    def score(name: str) -> float:
        head: Vectors = np.sum([encoded.texts[prompt] for prompt in prompts[name]], axis=0)
        return float(encoded.images[image] @ head / np.linalg.norm(head))

    return max(prompts, key=score)


def test_outcomes_are_those_of_a_plain_ranking(base: ClipBase) -> None:
    evaluator = Evaluator(base, stream().suites)
    made = evaluator.encode(None)
    found = evaluator.outcomes(made)
    for suite in stream().suites:
        if suite.task == "classification":
            prompts = {pair.label: [t.replace("{}", pair.label) for t in suite.templates] for pair in suite.items}
            right = [_named(made, pair.id, prompts) == pair.label for pair in suite.items]
            assert found[suite.name][:, 0].tolist() == right
            continue
        for row, pair in enumerate(suite.items):
            images = sorted(suite.items, key=lambda other: -float(made.texts[pair.text] @ made.images[other.id]))
            texts = sorted(
                {o.text for o in suite.items}, key=lambda text: -float(made.images[pair.id] @ made.texts[text])
            )
            right = [pair.text in texts[:5], any(other.text == pair.text for other in images[:5])]
            assert found[suite.name][row].tolist() == right


def test_a_protocol_has_the_wanted_sizes_and_its_bases_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Protocol] = []
    monkeypatch.setattr(run_continual, "run", lambda settings, wanted, protocol: asked.append(protocol))
    monkeypatch.setattr(run_continual, "show", lambda figures: None)
    for arguments in ([], ["--replay", "1500", "--items", "400"]):
        run_continual.main(Settings(home=tmp_path), ["--only", "default", *arguments])
    assert asked == [Protocol(), Protocol(replay=1500, items=400)] and asked[0].digest != asked[1].digest
    assert Protocol().on("shipped") == Protocol()
    assert Protocol(items=100).on("vit") == Protocol(gflops=BUDGETS["vit"], items=100)
    assert Protocol(gflops=100.0).on("vit") == Protocol(gflops=100.0)


def test_a_few_methods_run_under_noise_after_all_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, str]] = []

    def runner(name: str) -> Any:
        folder = tmp_path / name
        return SimpleNamespace(
            results=folder, updates=1, run=lambda units: not ran.extend((name, u.method) for u in units)
        )

    monkeypatch.setattr(run_continual, "read_reference", lambda results: None)
    monkeypatch.setattr(run_continual, "read_course", lambda folder, unit, *rest: _course(methods.index(unit.method)))
    methods = ["lora", "default", "agreement", "ewc", "lwf", "replay"]  # the later, the better
    wanted = Wanted(methods=methods, chains=1)
    clean, noisy = runner("clean"), runner("noisy")
    assert run_continual._run([clean], [], [noisy], wanted)
    assert [name for place, name in ran if place == "noisy"] == ["default", "agreement", "replay", "lwf", "ewc"]
    assert ran.index(("noisy", "default")) > max(number for number, each in enumerate(ran) if each[0] == "clean")


def _course(score: int) -> Any:
    return SimpleNamespace(trajectory=lambda reference: SimpleNamespace(gm=[score]))


@pytest.mark.parametrize("noise", ["swapped", "swapped=no", "swapped=0", "hostile=2", "other=0.1"])
def test_noise_that_cannot_be_is_refused(noise: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_continual.main(Settings(home=tmp_path), ["--noise", noise])
    assert "argument --noise: invalid" in capsys.readouterr().err


def test_figures_are_those_of_the_finished_chains_and_say_why_one_failed(results: Path) -> None:
    asked = read_reference(results)
    course = read_course(results, Unit("default"), 2, asked)
    assert course is not None
    failed = Unit("full").folder(results)
    failed.mkdir(parents=True, exist_ok=True)
    (failed / "failed.json").write_text(json.dumps({"reason": "the budget does not pay"}))
    methods = [*METHODS, "full"]
    read = read_chains(results, methods, 1, 2)
    outcome = figures(results, read, methods, 2, PROTOCOL)
    assert set(outcome["methods"]) == set(METHODS)
    own, gm = outcome["methods"]["default"], course.trajectory(asked).gm
    assert own["geometric_mean_delta"] == pytest.approx(100 * (gm[-1] - gm[0]), abs=0.01)
    assert own["maf"] <= 2 * PROTOCOL.gflops
    steps = sum(row["cost"]["maf_per_step"] * row["cost"]["steps"] for row in course.rows)
    assert own["maf_prepare"] == pytest.approx(course.total("gflops_spent") - steps, abs=0.006)
    assert outcome["untrained"]["zero-shot"]["geometric_mean_delta"] == 0.0
    text = markdown(outcome)
    assert "the budget does not pay" in text and all(f"| `{name}` |" in text for name in METHODS)
    noise = {label: {"ends": ends(read), "lead": leads({"shipped": read})} for label in ("clean", "10% swapped")}
    noisy = markdown(outcome | {"noise": noise}).partition("## Wrong captions")[2].partition("##")[0]
    shown = f"{own['a_ka_delta']:+.1f}, {own['a_zs_delta']:+.1f}"
    assert "| method | clean | 10% swapped |" in noisy and f"| `default` | {shown} | {shown} |" in noisy
    assert noisy.count(" to ") == 2, "the lead over the other method, in both columns"
    assert all(drawing.startswith("<svg") and ">default<" in drawing for drawing in all_plots(outcome).values())
