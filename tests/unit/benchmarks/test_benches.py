from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import BENCHMARKS, duty, run, scale, step
from benchmarks.duty import Phase
from benchmarks.trainer import SAMPLES, prepare_data
from core.errors import ConfigError, RatchetError
from core.loading import load_settings
from core.settings import Settings
from demo.load.traffic import CheckedSample, Report
from streams.publish.folders import read_folder
from streams.store.sample_store import SampleStore
from tests.support.tiny import tiny_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.adapters.kinds import KINDS
from updater.families.clip_learner import ClipLearner
from updater.recipes import load_recipe


def tiny_home(home: Path) -> Settings:
    tiny_base(home)
    folder_dataset(home / "data" / "things", count=30)
    overrides = {
        "home": home, "base.clip": "tiny", "updater.threads": 1, "updater.reference": [home / "data" / "things"]
    }  # fmt: skip
    return load_settings(overrides=overrides, environ={})


@pytest.mark.long
def test_a_step_is_measured_beside_open_clips_and_told_as_one_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_home(tmp_path)
    before = torch.get_num_threads()
    figures = step.run(settings, steps=2, pairs=20)
    assert torch.get_num_threads() == before
    step.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    for precision in ("float32", "bfloat16"):
        ours = figures[f"seconds_default_{precision}"]
        for side in ("open_clip", "open_clip_full"):
            ratio = figures[f"step_to_{side}_{precision}"]
            assert ratio == pytest.approx(ours / figures[f"seconds_{side}_{precision}"], abs=0.02)
            assert figures[f"step_to_{side}_{precision}_low"] <= ratio <= figures[f"step_to_{side}_{precision}_high"]
        assert figures[f"with_preparation_to_open_clip_{precision}"] > figures[f"step_to_open_clip_{precision}"]
    assert {"amx", "avx512_bf16"} <= figures["machine"].keys()
    assert figures["precision_auto"] == "float32", "of a small base, on every processor"
    recipe = load_recipe("default")
    assert (figures["model"], figures["batch"]) == ("tiny", recipe.batch_size)
    assert figures["pairs_of_an_update"] == 256 + recipe.reference_limit + recipe.replay_limit


def test_open_clips_step_trains_what_the_recipe_trains(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    recipe = load_recipe("default")
    learner = ClipLearner(base, recipe, {}, seed=0)
    _, adapted = KINDS.find(recipe.adapter.kind).build(base, base.build_model(), recipe, {}, 0, "cpu")
    side = step._OpenClip(adapted.model)
    before = {name: parameter.detach().clone() for name, parameter in adapted.model.named_parameters()}
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad}
    assert sorted(before[name].shape for name in trained) == sorted(p.shape for p in learner.parameters.values())
    images, texts = torch.randn(4, 3, 32, 32), base.tokenizer()(["a red car", "a tree", "a house", "a dog"])
    for number in range(2):
        for precision in step.PRECISIONS:
            side.step(precision, number, images, texts)
    for name, parameter in adapted.model.named_parameters():
        if name in trained:
            assert not torch.equal(before[name], parameter), name
        else:  # PEFT adds and subtracts what attention learns, and leaves the rounding
            assert torch.allclose(before[name], parameter, rtol=0, atol=1e-6), name


def test_without_a_reference_pool_there_is_nothing_to_step_on(tmp_path: Path) -> None:
    settings = tiny_home(tmp_path)
    bare = settings.model_copy(update={"updater": settings.updater.model_copy(update={"reference": []})})
    with pytest.raises(RatchetError, match="no reference pool for 'tiny'"):
        step.run(bare)


def test_requests_count_for_the_phase_in_which_they_were_due_and_only_if_they_were_answered(tmp_path: Path) -> None:
    """One second each before, starting, with and after the faults, which count for no phase; twice."""
    phases = [
        Phase(0, 1, "without"), Phase(1, 2, "starting"), Phase(2, 3, "with", steps=4),
        Phase(4, 5, "without"), Phase(5, 6, "starting"), Phase(6, 7, "with", steps=2),
    ]  # fmt: skip
    took = (0.01, 0.05, 0.03, 9.0)
    samples = [CheckedSample(number / 100, took[number // 100 % 4], release=1) for number in range(800)]
    refused = CheckedSample(0.5, 60.0, release=0, problem="429")
    report = Report(801, failed=1, mixed=0, releases=(1,), samples=(*samples, refused))
    figures = duty._figures(tiny_home(tmp_path), report, phases, rate=100)
    assert (figures["requests_without"], figures["requests_with"]) == (200, 200)
    assert (figures["p99_without"], figures["p99_starting"], figures["p99_with"]) == (0.01, 0.05, 0.03)
    assert figures["ratio_p99_starting"] == 5.0
    assert (figures["ratio_p99"], figures["ratio_p99_by_round"]) == (3.0, [3.0, 3.0])
    assert (figures["ratio_p99_low"], figures["ratio_p99_high"]) == (3.0, 3.0)
    assert (figures["failed"], figures["steps_per_second"]) == (1, 3.0)


def test_the_busy_trainer_gets_both_pools_and_an_update_without_an_end(tmp_path: Path) -> None:
    settings = prepare_data(tiny_home(tmp_path))
    store = SampleStore(settings.lake)
    assert store.count(version=store.version(), split="train", having="text") == SAMPLES
    (folder,) = settings.updater.reference
    assert len(read_folder(folder, split="train")) == SAMPLES
    endless, default = load_recipe(settings.updater.recipe), load_recipe("default")
    assert endless.model_copy(update={"max_steps": default.max_steps}) == default
    assert endless.max_steps >= 10**6


def test_an_engine_that_sleeps_answers_for_each_item_after_one_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(scale.time, "sleep", pauses.append)
    engine = scale.SleepingEngine.of(tiny_home(tmp_path), threads=1)
    vectors = engine.encode_texts(["a cat", "a dog", "a bird"])
    assert vectors.shape == (3, engine.base.dim) and pauses == [scale.PASS_SECONDS]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@pytest.mark.parametrize("nodes", ["0", "17"])
def test_nodes_are_bounded(tmp_path: Path, nodes: str) -> None:
    with pytest.raises(ConfigError, match="--nodes"):
        scale.main(tiny_home(tmp_path), ["--nodes", nodes])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_flags_and_builds_no_base_for_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, Settings(home=tmp_path / "home"), ["--help"])
    assert not ended.value.code and not (tmp_path / "home").exists()
