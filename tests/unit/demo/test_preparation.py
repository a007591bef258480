"""Data for the demo is prepared side by side, and only what is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.loading import load_settings
from demo.data import QUESTIONS, DemoData, PackageError, Preparation
from demo.data.domain import RECEIPT, VERSION
from demo.data.preparation import merged
from demo.first_start import clip_data, make_vlm, vlm_data
from streams.publish.folders import INDEX


def there(home: Path, name: str, split: str = "") -> Path:
    folder = home / "data" / name
    folder.mkdir(parents=True)
    (folder / INDEX).touch()
    (folder / RECEIPT).write_text(json.dumps({"version": VERSION, "split": split}))
    return folder


def test_suites_need_their_split_and_the_reference_pool_the_whole(tmp_path: Path) -> None:
    needed = merged(clip_data(load_settings(None, {"home": str(tmp_path)})))
    assert {each.name: each.split for each in needed} == {
        "noto": None, "pixel_ultica": None, "openclipart": "test", "fashion": "test", "flags": None,
        "stamp_photo": None,
    }  # fmt: skip


def test_questions_come_behind_the_whole_of_the_domains_that_they_ask_about(tmp_path: Path) -> None:
    settings = load_settings(None, {"home": str(tmp_path)})
    needed = merged([*clip_data(settings), *vlm_data(settings)])
    assert needed[-1] == DemoData("vqa_base")
    assert {DemoData(source) for source in QUESTIONS["vqa_base"].sources} <= set(needed[:-1])
    assert len({each.name for each in needed}) == len(needed)


def test_what_is_there_is_not_made_again_and_starts_no_process(tmp_path: Path) -> None:
    there(tmp_path, "openclipart", "test")
    with Preparation([DemoData("openclipart", "test")], tmp_path) as data:
        data.wait("openclipart")
        data.wait_for_all()
        assert data._pool is None


def test_a_package_that_cannot_be_had_is_named_to_whoever_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "dataset-fashion-mnist_1_all.deb").write_bytes(b"no package")
    there(tmp_path, "flags")
    with (
        pytest.raises(PackageError, match="dataset-fashion-mnist"),
        Preparation([DemoData("flags"), DemoData("fashion", "test")], tmp_path) as data,
    ):
        data.wait("flags")
        data.wait_for_all()


def test_a_first_start_makes_the_shipped_vlm_and_finds_it_again(tmp_path: Path) -> None:
    settings = load_settings(None, {"home": str(tmp_path), "base.clip": "mine"})
    make_vlm(settings)
    path = tmp_path / "bases" / "shipped-vlm" / "base.json"
    before = path.stat().st_mtime_ns
    make_vlm(settings)
    assert path.stat().st_mtime_ns == before
    assert clip_data(settings) == []


def test_an_unknown_name_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no demo data 'notto'"):
        Preparation([DemoData("notto")], tmp_path)
