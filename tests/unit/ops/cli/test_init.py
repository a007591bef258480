from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from core.digests import digest_bytes
from core.errors import ConfigError, GateError
from core.loading import load_settings
from core.settings.updates import Gate
from ops.cli.init_suites import suite_power
from ops.cli.main import app
from serving.engines.clip_base import list_bases
from streams.publish.folders import read_folder
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample
from tests.support.tiny import tiny_base
from updater.bases import need_reference
from updater.gate.statistics import items_needed, smallest_difference
from updater.gate.suites import load_suites
from updater.recipes import family_recipe
from updater.service.learning_state import check_suites

Run = Callable[..., Result]
COLOURS = {"red_thing": (200, 20, 20), "green_thing": (20, 200, 20), "blue_thing": (20, 20, 200)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``ratchet`` in an empty folder that has a tiny registered base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    tiny_base(Path(".ratchet"))
    return lambda *words, **how: CliRunner().invoke(app, list(words), **how)


def png(number: int, colour: tuple[int, int, int]) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 50, (16, 16, 3)) + np.array(colour)
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def class_folders(root: Path, each: int = 8) -> Path:
    for number, (name, colour) in enumerate(COLOURS.items()):
        (root / name).mkdir(parents=True)
        for picture in range(each):
            (root / name / f"{picture}.png").write_bytes(png(100 * number + picture, colour))
    return root


def pictures_of(split: str) -> set[bytes]:
    return {item.bytes() for item in read_folder(Path(".ratchet/data/things"), split=split)}


def made(run: Run, *words: str, data: str = "things") -> Result:
    done = run("init", "--model", "tiny", "--data", data, "--yes", *words)
    assert done.exit_code == 0, done.exception
    return done


def test_a_folder_of_classes_becomes_a_suite_and_a_reference_pool(run: Run) -> None:
    class_folders(Path("things"))
    done = made(run)
    settings = load_settings(environ={})
    (suite,) = load_suites(settings.gate.suites, settings.home)
    named = (suite.name, suite.task, suite.role, suite.margin)
    assert named == ("things-classification", "classification", "retention", 0.05)
    assert sorted({item.text for item in suite.items()}) == sorted(COLOURS)
    assert len(suite.items()) == 15
    assert settings.updater.reference == [suite.folder]
    held, rest = pictures_of("test"), pictures_of("train")
    assert (len(held), len(rest), held & rest) == (15, 9, set())
    assert (settings.base.clip, settings.base.vlm) == ("tiny", "")
    told = yaml.safe_load(Path("ratchet.yaml").read_text())
    assert set(told) == {"base", "gate", "updater"}
    for fact in ("24 pictures: 15 held out", "with fewer than 50", "513 fresh items", "3,420 new pairs"):
        assert fact in done.output, done.output
    Path("moved").mkdir()
    Path("things").rename("moved/things")
    made(run, "--force", data="moved/things")
    assert pictures_of("test") == held, "the same pictures are held out again wherever they lie"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_labelled_sample_with_captions_makes_both_suites(run: Run, suffix: str) -> None:
    names = [(path.parent.name, path.stem) for path in sorted(class_folders(Path("things")).rglob("*.png"))]
    rows = [{"file": f"{kind}/{stem}.png", "label": kind, "caption": f"{stem} {kind}"} for kind, stem in names]
    lines = [",".join(row.values()) for row in rows] if suffix == ".csv" else [json.dumps(row) for row in rows]
    labels = Path(f"sample{suffix}")
    labels.write_text("\n".join(["file,label,caption", *lines] if suffix == ".csv" else lines))
    made(run, "--labels", str(labels))
    settings = load_settings(environ={})
    tasks = {suite.task: suite for suite in load_suites(settings.gate.suites, settings.home)}
    assert set(tasks) == {"classification", "retrieval"}
    assert {item.text for item in tasks["retrieval"].items()} <= {row["caption"] for row in rows}


def test_a_model_without_suites_is_not_trained_until_stored_samples_have_made_some(run: Run) -> None:
    done = run("init", "--model", "tiny", "--yes")
    assert "nothing is trained until `ratchet init --from-stream 2000`" in done.output, done.exception
    written = Path("ratchet.yaml").read_text()
    settings = load_settings(environ={})
    with pytest.raises(GateError, match="suites does not exist") as lacking:
        check_suites(settings, "clip")
    assert "--from-stream" in lacking.value.fix
    splits: dict[str, set[bytes]] = {"train": set(), "fresh_eval": set()}
    rows = []
    for offset in range(40):
        kind, split = list(COLOURS)[offset % 3], "fresh_eval" if offset % 4 == 0 else "train"
        image = png(offset, COLOURS[kind])
        splits[split].add(image)
        words = {"text": f"a {kind} number {offset}", "label": kind}
        rows.append(sample(0, offset, split=split, image=image, id=digest_bytes(image), **words))
    put(SampleStore(settings.lake), rows, Position(TOPIC, 0, 40))
    told = run("init", "--from-stream", "30").output
    assert "30 pictures: 8 held out" in told
    assert Path("ratchet.yaml").read_text() == written
    suites = load_suites(settings.gate.suites, settings.home)
    assert {(suite.name, suite.task) for suite in suites} == {
        ("stream-classification", "classification"), ("stream-retrieval", "retrieval")
    }  # fmt: skip
    assert check_suites(settings, "clip") == 2
    need_reference(settings, family_recipe(settings, "clip"))
    (folder,) = settings.updater.reference
    held, rest = ({item.bytes() for item in read_folder(folder, split=each)} for each in ("test", "train"))
    assert held <= splits["fresh_eval"] and rest <= splits["train"] and (len(held), len(rest)) == (8, 22)
    assert "next     set gate.mean_margin" in told


def test_a_picture_that_is_there_twice_is_on_one_side(run: Run) -> None:
    folder = class_folders(Path("things"))
    for number in range(8):
        (folder / "red_thing" / f"copy{number}.png").write_bytes((folder / "red_thing" / f"{number}.png").read_bytes())
    (folder / "green_thing" / "also_blue.png").write_bytes((folder / "blue_thing" / "0.png").read_bytes())
    (folder / "blue_thing" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (folder / "notes.txt").write_text("no picture")
    done = made(run)
    held, rest = pictures_of("test"), pictures_of("train")
    assert (len(held | rest), held & rest) == (23, set())
    assert "2 cannot be used" in done.output
    assert "the same picture has several classes" in done.output


def test_what_a_suite_can_show_is_what_the_gate_needs_turned_round(run: Run) -> None:
    class_folders(Path("things"), each=30)
    gate = Gate(min_items=10, margin=0.1)
    made(run, "--margin", "0.1", "--held-out", "1.0")
    assert load_settings(environ={}).updater.reference == []
    (suite,) = load_suites([Path("suites")], Path(".ratchet"))
    shown = suite_power(suite, gate)
    assert (shown.items, shown.units, shown.needed, shown.enough) == (90, 67, 39, True), "a quarter is sealed"
    assert load_settings(environ={}).gate.mean_margin == 0.08, "what 67 items show, in steps of half a point"
    level = gate.alpha  # all candidates have it, because of their losses
    for items in (39, 90, 2000):
        distance = smallest_difference(0.25, items, level)
        assert items_needed(0.25, distance + 1e-9, level) == items
    assert shown.excludes == pytest.approx(0.0759, abs=0.0005)
    narrow = suite_power(suite.model_copy(update={"margin": 0.05}), gate)
    assert not narrow.enough and "--margin 0.08" in narrow.advice


WRONG: dict[str, tuple[list[str], str, str]] = {
    "no model": ([], "--model is not given", "--yes"),
    "a hub": (["--model", "hf-hub:a/b"], "--model: hf-hub:a/b", "ratchet base add"),
    "an empty store": (["--model", "tiny", "--from-stream", "100"], "--from-stream: no sample", "Publish some"),
    "one class": (["--model", "tiny", "--data", "one"], "--data: the 5 pictures", "captions"),
    "other columns": (["--model", "tiny", "--labels", "wrong.csv"], "--labels: wrong.csv, line 1", "caption"),
    "broker away": (["--model", "tiny", "--data", "things", "--broker", "127.0.0.1:1"], "--broker", "--offline"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message", "fix"), WRONG.values(), ids=list(WRONG))
def test_an_error_names_the_option_and_the_fix_and_nothing_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str, fix: str
) -> None:
    monkeypatch.setattr("ops.cli.init.BROKER_SECONDS", 0.3)
    class_folders(Path("things"), each=4)
    shutil.copytree(class_folders(Path("more")) / "red_thing", "one/red_thing")
    Path("wrong.csv").write_text("name,number\na,1\n")
    error = run("init", *words, *(["--yes"] if words else [])).exception
    assert isinstance(error, ConfigError), error
    assert message in error.message
    assert fix in error.fix
    assert not Path("ratchet.yaml").exists()
    assert not Path("suites").exists()
    assert list_bases(Path(".ratchet"), "clip") == ["tiny"]


def test_a_broker_that_is_away_is_not_asked_offline_and_nothing_is_overwritten_without_force(run: Run) -> None:
    class_folders(Path("things"))
    made = ("init", "--model", "tiny", "--data", "things", "--yes")
    broker = ("--broker", "127.0.0.1:1", "--topic", "pairs", "--offline")
    done = run("--set", "serve.port=9000", *made, *broker)
    assert done.exit_code == 0, done.exception
    settings = load_settings(environ={})
    assert (settings.kafka.bootstrap, settings.kafka.topic, settings.serve.port) == ("127.0.0.1:1", "pairs", 9000)
    before = Path("ratchet.yaml").read_text()
    for kept in ("ratchet.yaml", "things"):
        error = run(*made).exception
        assert isinstance(error, ConfigError)
        assert f"{kept} exists already" in error.message and "--force" in error.fix
        assert kept == "things" or Path("ratchet.yaml").read_text() == before
        Path("ratchet.yaml").unlink(missing_ok=True)
    assert run(*made, "--force").exit_code == 0


def test_a_secret_is_not_written(run: Run) -> None:
    class_folders(Path("things"))
    for flag in ("serve.operator_key=hunter2", "kafka.client={a: hunter2}", "ledger_url=postgresql://a:hunter2@b/c"):
        error = run("--set", flag, "init", "--model", "tiny", "--data", "things", "--yes").exception
        assert isinstance(error, ConfigError)
        assert "hunter2" not in str(error)
        assert "RATCHET_" in error.fix
        assert not Path("ratchet.yaml").exists()
