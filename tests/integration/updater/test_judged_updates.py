"""What the gate is asked about an update: its heads, the half of a suite that tuned nothing, and the best release."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from core.settings.updates import LearnedHead
from serving.engines.adapters import read_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, changed, commit, judged_as, made_by, report_of
from tests.support.sealing import NOTHING
from tests.support.tiny import tiny_adapter
from tests.unit.updater.builders import COLOURS, recipe
from tests.unit.updater.gate.builders import folder_dataset
from updater.families import spaces_of
from updater.gate.run import open_evaluator
from updater.gate.sample_suites import HeldOut, head_suites
from updater.gate.suites import load_suites
from updater.service.gate_update import TuningScores, tuned_on, update_suites
from updater.service.update_loop import UpdaterService


@pytest.fixture
def labelled(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home with 36 labelled samples, whose updates learn a head."""
    judged_as("passed", monkeypatch)
    add_labelled(settings, 36, "train")
    heads = [
        LearnedHead(name="colours", domains=["things"], min_images=4),
        LearnedHead(name="elsewhere", domains=["no such domain"]),
    ]
    return changed(settings, "updater", heads=heads)


def add_labelled(settings: Settings, count: int, split: str) -> None:
    add_samples(settings, count, split=split, words=lambda offset: {"label": COLOURS[offset % 3]})


def test_a_labelled_stream_ends_in_a_head_that_the_gate_asks(labelled: Settings) -> None:
    add_labelled(labelled, 24, "fresh_eval")
    service = UpdaterService(labelled)
    update = made_by(service)
    folder = Artifacts(labelled.artifacts).fetch(f"adapters/{update.adapter}")
    files = read_adapter(folder)
    assert files.name == update.adapter and list(files.heads) == ["colours"]
    head = files.heads["colours"]
    assert head.labels == tuple(sorted(COLOURS[:3])) and head.counts == (12, 12, 12)
    report = report_of(labelled, update)
    (suite,) = [each for each in report["suites"] if each["name"] == "head.colours"]
    assert suite["role"] == "retention" and suite["n"] == 24
    assert {check["name"]: check["ok"] for check in report["checks"]}["loads"]
    bare = changed(labelled, "updater", heads=[])
    with pytest.raises(AdapterError, match="nothing judges the head 'colours'"):
        head_suites(
            bare, HeldOut(service.store, update.store_version, None, NOTHING), files.heads
        )  # what is not judged does not pass
    # learned of the candidate's own vectors, and of no sample that is held out
    engine = ClipEngine(load_base(labelled.home, "tiny"), "cpu")
    engine.load(files.name, folder)
    rows = service.store.scan(split="train", columns=["image", "label"]).to_pylist()
    pixels = np.stack([engine.base.preprocess.pixels(row["image"]) for row in rows])
    vectors = engine.encode_images(pixels, files.name)
    for number, label in enumerate(head.labels):
        own = [vector for vector, row in zip(vectors, rows, strict=True) if row["label"] == label]
        assert head.means[number] == pytest.approx(np.mean(own, axis=0), abs=1e-5)


def test_a_head_that_the_gate_could_not_judge_is_not_learned(
    labelled: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    add_labelled(labelled, 6, "fresh_eval")
    update = made_by(UpdaterService(labelled))
    assert read_adapter(Artifacts(labelled.artifacts).fetch(f"adapters/{update.adapter}")).heads == {}
    lines = capsys.readouterr().err
    assert "head colours: 6 labelled samples are held out, and the gate needs 10" in lines
    assert "head elsewhere: fewer than two classes" in lines


def test_a_merge_weight_is_chosen_on_one_half_and_judged_by_the_other(settings: Settings) -> None:
    home = settings.home
    plan = recipe("paint", max_steps=4, reference_limit=20, merge={"rule": "linear", "search": [0.3, 1.0]})
    (home / "default.yaml").write_text(plan.to_yaml())
    folder_dataset(home / "data" / "few", count=6)
    (home / "suites" / "few.yaml").write_text("task: retrieval\ndata: ${home}/data/few\n")
    suites = load_suites(settings.gate.suites, home, "clip")
    assert {suite.name for suite in suites} == {"few", "things"}
    tuned = tuned_on(suites, min_items=5)
    assert [suite.name for suite in tuned] == ["things"], "one too small to be divided is left to the gate"
    assert tuned_on(suites, min_items=30) == []
    assert 5 <= TuningScores(settings, load_base(home, "tiny"), tuned).passes <= 25

    add_samples(settings, 12)
    add_samples(settings, 48, split="fresh_eval")
    service = UpdaterService(settings)
    update = made_by(service)
    scores = update.cost["search_scores"]
    chosen = scores[f"{update.cost['merge_weight']:g}"]
    assert set(scores) == {"0.3", "1"} and chosen == max(scores.values())
    assert update.cost["search_gflops"] > 0
    report = report_of(settings, update)
    halves = {suite["name"]: suite["half"] for suite in report["suites"]}
    assert halves == {"few": "all", "things": "hidden", "fresh.things": "hidden"}
    assert sorted(report["meta"]["tuned_on"]) == ["fresh.things", "things"]
    own, fresh = update_suites(settings, service.store, update, NOTHING)
    with open_evaluator(settings, load_base(home, "tiny")) as evaluator:
        name = str(update.adapter)
        evaluator.load(name, service.artifacts.fetch(f"adapters/{name}"))
        halved = [suite.half("tuning") for suite in (*own, *fresh) if suite.name != "few"]
        marks = [float(evaluator.score(suite, name).hits.mean()) for suite in halved]
    assert len(marks) == 2 and sum(marks) / 2 == pytest.approx(chosen)


def release(settings: Settings, folder: Path, gain: float, seed: int) -> str:
    base = load_base(settings.home, "tiny")
    name = tiny_adapter(base, folder, seed=seed)
    ledger = Ledger.open(settings.ledger)
    Artifacts(settings.artifacts).put_directory(folder, f"adapters/{name}")
    ledger.register_adapter(name, "clip", base.digest, *spaces_of(base, folder), {}, digest=directory_digest(folder))
    ledger.begin_update(
        f"u-{seed}", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites = {"things": {"role": "retention", "after": 0.2 + gain, "base": 0.2, "before": 0.2, "n": 30}}
    ledger.record_verdict(f"u-{seed}", name, "passed", "reports/x", {"suites": suites})
    ledger.advance_update(f"u-{seed}", "done", adapter=name)
    commit(ledger, clip=name)
    return name


def test_a_candidate_is_compared_with_the_best_release_or_the_report_says_that_it_is_gone(
    settings: Settings, tmp_path: Path
) -> None:
    def suites_of(update: UpdateRow) -> Any:
        verdict = service.ledger.verdict_of(update.id)
        assert verdict is not None
        return verdict.summary["suites"]

    best, incumbent = (release(settings, tmp_path / str(seed), gain, seed) for seed, gain in ((1, 0.3), (2, 0.1)))
    add_samples(settings, 12)
    add_samples(settings, 12, split="fresh_eval")
    service = UpdaterService(settings)
    update = made_by(service)
    assert update.incumbent == incumbent
    suites = suites_of(update)
    compared = suites["things"]["best_release"]
    assert suites["things"]["best"] == best and -1 <= compared["ci_low"] <= compared["ci_high"] <= 1
    assert "best" not in suites["fresh.things"]

    shutil.rmtree(settings.home / "artifacts" / "adapters" / best)
    add_samples(settings, 12)
    later = made_by(service, now=True)
    assert later.id != update.id and "best" not in suites_of(later)["things"]
    assert list(report_of(settings, later)["meta"]["not_compared"]) == [best]
