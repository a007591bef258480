from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import BENCHMARKS, duty, run, scale, step
from benchmarks.duty import Phase
from benchmarks.stream.amplification import Amplification, measure
from benchmarks.stream.growth import Growth
from benchmarks.stream.ingest import figures_of
from benchmarks.stream.jpegs import canvas, jpegs
from benchmarks.stream.ratchet_process import write_settings
from benchmarks.stream.throughput import Throughput
from benchmarks.swap import ROLLBACK_EVERY, VLM_EVERY, Swaps, by_swap, ratio_interval
from benchmarks.trainer import SAMPLES, prepare_data
from core.loading import load_settings
from core.settings import Settings
from core.settings.streams import Kafka
from demo.load.traffic import CheckedSample, Report
from ratchet_client import ServerError
from ratchet_client.images import decode_image
from streams.publish.folders import read_folder
from streams.store.sample_store import SampleStore
from tests.support.tiny import tiny_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.adapters.kinds import KINDS
from updater.families.clip_learner import ClipLearner
from updater.recipes import load_recipe


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tiny_base(tmp_path)
    reference = folder_dataset(tmp_path / "data" / "things", count=30)
    overrides = {"home": tmp_path, "base.clip": "tiny", "updater.threads": 1, "updater.reference": [reference]}
    return load_settings(overrides=overrides, environ={})


@pytest.mark.long
def test_a_step_is_measured_beside_open_clips(settings: Settings) -> None:
    before = torch.get_num_threads()
    figures = step.run(settings, steps=2, pairs=20)
    assert torch.get_num_threads() == before
    for precision in ("float32", "bfloat16"):
        ours = figures[f"seconds_default_{precision}"]
        for side in ("open_clip", "open_clip_full"):
            ratio = figures[f"step_to_{side}_{precision}"]
            assert ratio == pytest.approx(ours / figures[f"seconds_{side}_{precision}"], abs=0.02)
            assert figures[f"step_to_{side}_{precision}_low"] <= ratio <= figures[f"step_to_{side}_{precision}_high"]
        assert figures[f"with_preparation_to_open_clip_{precision}"] > figures[f"step_to_open_clip_{precision}"]
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


def test_requests_count_for_the_phase_in_which_they_were_due_and_only_if_they_were_answered(settings: Settings) -> None:
    """One second each before, starting, with and after the faults, which count for no phase; twice."""
    phases = [
        Phase(0, 1, "without"), Phase(1, 2, "starting"), Phase(2, 3, "with", steps=4),
        Phase(4, 5, "without"), Phase(5, 6, "starting"), Phase(6, 7, "with", steps=2),
    ]  # fmt: skip
    took = (0.01, 0.05, 0.03, 9.0)
    samples = [CheckedSample(number / 100, took[number // 100 % 4], release=1) for number in range(800)]
    refused = CheckedSample(0.5, 60.0, release=0, problem="429")
    report = Report(801, failed=1, mixed=0, releases=(1,), samples=(*samples, refused))
    figures = duty._figures(settings, report, phases, rate=100)
    assert (figures["requests_without"], figures["requests_with"]) == (200, 200)
    assert (figures["p99_without"], figures["p99_starting"], figures["p99_with"]) == (0.01, 0.05, 0.03)
    assert figures["ratio_p99_starting"] == 5.0
    assert (figures["ratio_p99"], figures["ratio_p99_by_round"]) == (3.0, [3.0, 3.0])
    assert (figures["ratio_p99_low"], figures["ratio_p99_high"]) == (3.0, 3.0)
    assert (figures["failed"], figures["steps_per_second"]) == (1, 3.0)


def test_the_busy_trainer_gets_both_pools_and_an_update_without_an_end(settings: Settings) -> None:
    busy = prepare_data(settings)
    store = SampleStore(busy.lake)
    assert store.count(version=store.version(), split="train", having="text") == SAMPLES
    (folder,) = busy.updater.reference
    assert len(read_folder(folder, split="train")) == SAMPLES
    endless, default = load_recipe(busy.updater.recipe), load_recipe("default")
    assert endless.model_copy(update={"max_steps": default.max_steps}) == default
    assert endless.max_steps >= 10**6


def test_a_sleeping_engine_answers_all_after_one_pause(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(scale.time, "sleep", pauses.append)
    engine = scale.SleepingEngine.of(settings, threads=1)
    vectors = engine.encode_texts(["a cat", "a dog", "a bird"])
    assert vectors.shape == (3, engine.base.dim) and pauses == [scale.PASS_SECONDS]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_tells_its_flags_and_builds_no_base_for_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, Settings(home=tmp_path / "home"), ["--help"])
    assert not ended.value.code and not (tmp_path / "home").exists()


class RecordingClient:
    """Refuses the first rollbacks for now."""

    def __init__(self, refuses: int = 0) -> None:
        self.calls: list[str] = []
        self.refuses = refuses

    def release(self, clip: str = "", *, reason: str, force: bool, vlm: str = "") -> dict[str, Any]:
        self.calls.append("vlm" if vlm else "clip")
        return {"prepare_seconds": 0.0, "commit_seconds": 0.0}

    def rollback(self, reason: str) -> None:
        self.calls.append("rollback")
        if len(self.calls) <= self.refuses:
            raise ServerError("the ledger did not say in time.", status=503)


def test_every_fourth_change_is_a_rollback_and_the_vlm_changes_at_a_smaller_number() -> None:
    client, swaps = RecordingClient(), Swaps(["a", "b"], ["v", "w"])
    for number in range(1, 101):
        swaps.change(client, number)
    assert client.calls[ROLLBACK_EVERY - 1 :: ROLLBACK_EVERY] == ["rollback"] * 25
    assert (client.calls.count("vlm"), swaps.vlm_releases) == (100 // VLM_EVERY, 100 // VLM_EVERY)
    assert (len(swaps.releases), len(swaps.rollbacks), len(swaps.windows)) == (70, 25, 100)
    alone, without = RecordingClient(refuses=2), Swaps(["a"], [])
    without.change(alone, ROLLBACK_EVERY)
    assert (alone.calls, without.refused, len(without.rollbacks)) == (["rollback"] * 3, 2, 1), "it is made again"
    for number in range(1, 22):
        without.change(alone, number)
    assert "vlm" not in alone.calls


def test_a_request_is_inside_of_a_swap_by_when_it_was_sent_and_not_by_how_long_it_took() -> None:
    """One request in a hundred takes a second at any time; with swaps of zero length, none of them is inside one."""
    samples = [CheckedSample(due=n / 100, seconds=1.0 if n % 100 == 0 else 0.01, release=1) for n in range(10_000)]
    rounds = by_swap(samples, [(n + 0.505, n + 0.505) for n in range(100)], reach=0.01)
    assert [len(inside) for inside, _ in rounds] == [1] * 100
    assert {seconds for inside, _ in rounds for seconds in inside} == {0.01}
    assert sum(len(outside) for _, outside in rounds) == 9_900
    assert max(rounds[0][1]) == 1.0


def test_the_interval_of_the_ratio_narrows_with_swaps_and_holds_it() -> None:
    random = np.random.default_rng(1)

    def interval(swaps: int) -> tuple[float, float]:
        rounds = [(1.2 * random.exponential(size=200), random.exponential(size=200)) for _ in range(swaps)]
        return ratio_interval([(list(inside), list(outside)) for inside, outside in rounds])

    few, many = interval(10), interval(200)
    assert few[0] < many[0] < 1.2 < many[1] < few[1]
    assert many[1] - many[0] < (few[1] - few[0]) / 2


@pytest.mark.parametrize("size", [20_000, 100_000])
def test_images_have_about_the_size_that_was_asked_for_and_no_two_are_alike(size: int) -> None:
    images = list(jpegs(canvas(size), 12))
    assert len(set(images)) == 12
    assert sum(map(len, images)) / 12 == pytest.approx(size, rel=0.15)
    assert images[0].startswith(b"\xff\xd8") and decode_image(images[0], 10**7, 10**7, 8).mode == "RGB"


def test_the_settings_of_a_benchmark_reach_its_processes(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, kafka=Kafka(topic="bench", client={"session_timeout_ms": "9000"}))
    loaded = load_settings(write_settings(settings, tmp_path / "settings.json"), environ={})
    assert loaded.model_dump(exclude={"access"}) == settings.model_dump(exclude={"access"})


def test_what_maintenance_writes_is_counted_by_its_files(tmp_path: Path) -> None:
    result = measure(tmp_path, rows=2_000, commit_rows=50, commits_a_run=10, image_bytes=500)
    assert 1_000_000 < result.ingested < 4_000_000
    assert 0 < result.ratio < 3
    assert SampleStore(Settings(home=tmp_path).lake).count() == 2_000


def test_the_demanded_figures_are_the_worst_of_what_was_measured() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": each, "cpu_seconds": 1.0, "memory": 2**20} for each in seconds]

    rates = [
        Throughput(20_000, 100, runs(0.5, 0.5), runs(1, 3), runs(2, 2), runs(1, 1)),
        Throughput(100_000, 100, runs(0.4), runs(1), runs(2), runs(1)),
    ]
    growths = [Growth(10, 0.1, 0.2, 100, 1, 1), Growth(1000, 0.12, 0.3, 110, 9, 5)]
    writes = [Amplification(10, 1, 1, 100, 50, 10, 1), Amplification(10, 1, 1, 100, 90, 5, 1)]
    figures = figures_of(rates, growths, writes)
    assert (figures["ratio_to_bare"], figures["ratio_to_bare_two"], figures["ratio_to_fetch"]) == (0.5, 1.0, 0.2)
    assert (figures["commit_growth"], figures["memory_growth"]) == (1.2, 1.1)
    assert (figures["write_amplification"], figures["start_seconds_at_1m"]) == (0.95, 9)
