"""The benchmark on data sets and suites of one's own."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import ray

from benchmarks.continual import run_continual
from benchmarks.continual.own_data import STEPS, OwnData, own_stream
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.ray_tasks import ray_tasks
from benchmarks.random_base import random_base
from core.errors import ConfigError
from core.settings import Settings
from core.settings.serving import BaseModels
from streams.publish.folders import FolderItem, write_folder
from tests.support.tiny import tiny_base
from tests.unit.benchmarks.builders import PROTOCOL
from tests.unit.updater.builders import COLOURS, picture

THINGS = ("car", "boat")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data sets ``car`` (a folder dataset) and ``boat`` (a folder for each class), and suites of both and of
    trees."""
    home = tmp_path_factory.mktemp("home")
    tiny_base(home)
    for number, thing in enumerate((*THINGS, "tree")):
        for split in ("train", "test"):
            folder = home / f"{thing}-{split}" if (thing, split) != ("boat", "train") else home / "boat"
            folder = home / "car" if (thing, split) == ("car", "train") else folder
            rows = [(folder / f"{COLOURS[row % 6]} {thing}" / f"{row}.png", row) for row in range(12)]
            for path, row in rows:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(1000 * number + row + 100 * (split == "test")))
            if folder.name != "boat":
                items = [
                    FolderItem(path, f"a {path.parent.name}, number {row}", path.parent.name) for path, row in rows
                ]
                write_folder(folder, items)
    suites = {
        "car": {"task": "retrieval", "data": str(home / "car-test"), "role": "gain"},
        "boat": {"task": "classification", "data": str(home / "boat-test"), "names": {"green boat": "emerald ship"}},
        "tree": {"task": "retrieval", "data": str(home / "tree-test")},
    }
    (home / "suites").mkdir()
    for name, suite in suites.items():
        (home / "suites" / f"{name}.yaml").write_text(json.dumps(suite))
    return home


def _data(home: Path, **changes: Any) -> OwnData:
    suites = tuple(sorted((home / "suites").glob("*.yaml")))
    return replace(OwnData((home / "car", home / "boat"), suites, (home / "tree-train",)), **changes)


def _small_b16() -> dict[str, Any]:
    """ViT-B/16 with two narrow layers: its image size, patches, tokens and vocabulary."""
    config = copy.deepcopy(open_clip.get_model_config("ViT-B-16"))
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"width": 64, "layers": 2}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    return config


def test_each_data_set_is_an_update_and_its_namesake_asks_for_it(home: Path) -> None:
    stream = own_stream(home, _data(home), PROTOCOL)
    assert {name: len(pairs) for name, pairs in stream.updates.items()} == {"car": 12, "boat": 12}
    assert {pair.domain for pair in stream.updates["boat"]} == {"boat"}
    assert [(suite.name, suite.role) for suite in stream.suites] == [
        ("boat", "adaptation"), ("car", "adaptation"), ("tree", "held-out"),
    ]  # fmt: skip
    assert len(stream.reference) == PROTOCOL.reference
    assert "emerald ship" in stream.suites[0].classes and "green boat" not in stream.suites[0].classes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"updates": ("car", "boat", "tree-train")}, "no suite asks what the update 'tree-train' teaches"),
        ({"updates": ("car", "boat/../car")}, "two data sets are named 'car'"),
        ({"suites": ("suites/car.yaml", "suites/boat.yaml")}, "no suite asks what is kept"),
    ],
)
def test_what_is_missing_is_named(home: Path, changes: dict[str, tuple[str, ...]], said: str) -> None:
    data = _data(home, **{name: tuple(home / each for each in paths) for name, paths in changes.items()})
    with pytest.raises(ConfigError, match=said):
        own_stream(home, data, PROTOCOL)


def test_a_suite_of_training_pictures_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "car.yaml").write_text(json.dumps({"task": "retrieval", "data": str(home / "car")}))
    suites = (tmp_path / "car.yaml", home / "suites" / "boat.yaml", home / "suites" / "tree.yaml")
    with pytest.raises(ConfigError, match="look like a training picture"):
        own_stream(home, _data(home, suites=suites), PROTOCOL)


def test_one_command_runs_it_and_goes_on_where_it_was_stopped(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "b16", _small_b16())
    random_base(home, "b16")
    protocol = replace(PROTOCOL, gflops=Protocol.gflops)
    monkeypatch.setitem(run_continual.FAMILIES, "clip", replace(run_continual.FAMILIES["clip"], protocol=protocol))
    command = [
        "--base", "b16", "--stream", str(home / "car"), str(home / "boat"), "--suite", str(home / "suites"),
        "--only", "default,lora", "--chains", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    settings = Settings(home=home, base=BaseModels(clip="tiny"))
    run_continual.main(settings, command)
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["methods"]) >= {"default", "lora"} and line["failed"] == {}
    assert {"gm", "a_ka", "a_zs", "wide"} <= set(line["lead"]["lora"])
    assert "mtil" in line["methods"]["default"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["methods"]["default"]["steps"] == STEPS * 2
    table = (tmp_path / "README.md").read_text()
    run_continual.main(settings, [*command, "--report"])
    assert (tmp_path / "README.md").read_text() == table


@pytest.mark.long
def test_workers_run_and_end_as_tasks_of_a_cluster(tmp_path: Path) -> None:
    start, processors = ray_tasks("local")
    try:
        assert processors >= 1
        log = tmp_path / "log.txt"
        code = "import os, sys; print(os.environ['WORD']); sys.exit(3)"
        ended = start([sys.executable, "-c", code], {"WORD": "hello"}, log)
        assert (ended.wait(), ended.poll(), ended.returncode) == (3, 3, 3)
        assert log.read_text() == "hello\n"
        endless = start([sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"], {}, log)
        while "on" not in log.read_text():
            assert endless.poll() is None
        endless.terminate()
        assert endless.wait() < 0
    finally:
        ray.shutdown()
    with pytest.raises(ConfigError, match="no Ray cluster"):
        ray_tasks("127.0.0.1:1")
