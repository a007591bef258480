"""A labelled stream yields a head that the gate evaluates, in the adapter that it was learned for."""

from __future__ import annotations

import numpy as np
import pytest

from core.artifacts import Artifacts
from core.errors import AdapterError
from core.settings import Settings
from core.settings.updates import LearnedHead
from serving.engines.adapters import read_adapter
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from tests.integration.updater.home import add_samples, changed, judged_as, made_by, report_of
from tests.unit.updater.builders import COLOURS
from updater.gate.sample_suites import head_suites
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration
HEADS = [
    LearnedHead(name="colours", domains=["things"], min_images=4),
    LearnedHead(name="elsewhere", domains=["no such domain"]),
]


@pytest.fixture
def settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    judged_as("passed", monkeypatch)
    return changed(settings, "updater", heads=HEADS)


def add_labelled(settings: Settings, train: int, held_out: int) -> None:
    for count, split in ((train, "train"), (held_out, "fresh_eval")):
        add_samples(settings, count, split=split, words=lambda offset: {"label": COLOURS[offset % 3]})


def test_a_labelled_stream_ends_in_a_head_that_the_gate_asks(settings: Settings) -> None:
    add_labelled(settings, 36, 24)
    service = UpdaterService(settings)
    update = made_by(service)
    folder = Artifacts(settings.artifacts).fetch(f"adapters/{update.adapter}")
    files = read_adapter(folder)
    assert files.name == update.adapter and list(files.heads) == ["colours"]
    head = files.heads["colours"]
    assert head.labels == tuple(sorted(COLOURS[:3])) and head.counts == (12, 12, 12)
    report = report_of(settings, update)
    (suite,) = [each for each in report["suites"] if each["name"] == "head.colours"]
    assert suite["role"] == "retention" and suite["n"] == 24
    assert {check["name"]: check["ok"] for check in report["checks"]}["loads"]
    bare = changed(settings, "updater", heads=[])
    with pytest.raises(AdapterError, match="nothing judges the head 'colours'"):
        head_suites(bare, service.store, update.store_version, files.heads)  # what is not judged does not pass
    # learned of the candidate's own vectors, and of no sample that is held out
    engine = ClipEngine(load_base(settings.home, "tiny"), "cpu")
    engine.load(files.name, folder)
    rows = service.store.scan(split="train", columns=["image", "label"]).to_pylist()
    pixels = np.stack([engine.base.preprocess.pixels(row["image"]) for row in rows])
    vectors = engine.encode_images(pixels, files.name)
    for number, label in enumerate(head.labels):
        own = [vector for vector, row in zip(vectors, rows, strict=True) if row["label"] == label]
        assert head.means[number] == pytest.approx(np.mean(own, axis=0), abs=1e-5)


def test_a_head_that_the_gate_could_not_judge_is_not_learned(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    add_labelled(settings, 36, 6)
    update = made_by(UpdaterService(settings))
    assert read_adapter(Artifacts(settings.artifacts).fetch(f"adapters/{update.adapter}")).heads == {}
    lines = capsys.readouterr().err
    assert "head colours: 6 labelled samples are held out, and the gate needs 10" in lines
    assert "head elsewhere: fewer than two classes" in lines
