from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from core.errors import ConfigError
from core.loading import load_settings
from demo.data import (
    DOMAINS,
    QUESTIONS,
    DemoData,
    PackageError,
    Preparation,
    domain,
    prepare_domain,
    prepare_questions,
)
from demo.data.domain import RECEIPT, VERSION, DomainInfo, Draft, build, concept_of, flag_concept, split_of
from demo.data.emoji import _emoji
from demo.data.preparation import merged
from demo.data.render import decode
from demo.first_start import clip_data, make_vlm, vlm_data
from streams.publish.folders import INDEX, read_folder
from tests.support.pictures import png

ROOT = Path(__file__).parents[3]


def drafts() -> Iterator[Draft]:
    for number in range(150):
        colour = (number, 255 - number, 0)
        yield Draft(
            f"n{149 - number:03}", f"colour {number}", f"colour {number}", partial(Image.new, "RGB", (9, 9), colour)
        )
    yield Draft("same", "again", "again", partial(Image.new, "RGB", (9, 9), (0, 255, 0)))
    yield Draft("unfit", "unfit", "unfit", partial(decode, b"no"))
    yield Draft("fixed", "fixed", "fixed", partial(decode, png("navy")), split="test")


def toy(builder: Callable[..., Iterator[Draft]] = drafts) -> DomainInfo:
    return DomainInfo("toy", (), "CC0-1.0", "nobody", builder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_are_complete_and_counted(tmp_path: Path) -> None:
    folder = build(toy(), tmp_path)
    items = read_folder(folder)
    assert folder == tmp_path / "data" / "toy"
    assert len(items) == 151
    assert {item.domain for item in items} == {"toy"}
    assert all(item.split == split_of(item.concept) for item in items if item.concept != "fixed")
    assert next(item for item in items if item.concept == "fixed").split == "test"
    receipt = json.loads((folder / RECEIPT).read_text())
    assert receipt["skipped"] == {"not a readable picture": 1, "same picture as another": 1}
    assert sum(receipt["splits"].values()) == 151
    assert receipt["licence"] == "CC0-1.0"


def test_two_machines_get_the_same_bytes_and_a_domain_is_made_once(tmp_path: Path) -> None:
    folder = build(toy(), tmp_path / "a")
    assert content(folder) == content(build(toy(), tmp_path / "b"))

    def never() -> Iterator[Draft]:
        raise AssertionError("built again")

    assert build(toy(never), tmp_path / "a") == folder


def test_it_is_made_again_when_builders_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(toy(), tmp_path)
    (folder / "stray").touch()
    monkeypatch.setattr(domain, "VERSION", domain.VERSION + 1)
    build(toy(), tmp_path)
    assert not (folder / "stray").exists()
    assert len(read_folder(folder)) == 151


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Draft]:
        yield from drafts()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        build(toy(broken), tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".toy.lock"]
    assert len(read_folder(build(toy(), tmp_path))) == 151


def test_two_at_once_make_one(tmp_path: Path) -> None:
    made: list[int] = []

    def counted() -> Iterator[Draft]:
        made.append(1)
        yield from drafts()

    threads = [Thread(target=build, args=(toy(counted), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert len(read_folder(tmp_path / "data" / "toy")) == 151


@pytest.mark.parametrize(("ask", "problem"), [
    (partial(prepare_domain, "notto"), r"no demo domain 'notto'.*noto"),
    (partial(prepare_questions, "vqa"), r"no demo questions 'vqa'.*vqa_base"),
    (partial(Preparation, [DemoData("notto")]), r"no demo data 'notto'.*demo data list"),
])  # fmt: skip
def test_an_unknown_name_is_refused_with_the_known_ones_before_anything_is_made(
    tmp_path: Path, ask: Callable[[Path], object], problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ask(tmp_path)
    assert re.search(problem, f"{caught.value} {caught.value.fix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("A crowned crane.", "crowned crane"),
        ("An otter", "otter"),
        ("the town hall", "town hall"),
        ("woman running: facing right", "person running"),
        ("man running", "person running"),
        ("telescoping umbrella (collapsed)", "telescoping umbrella"),
        ("T-Rex", "t rex"),
        ("Mountain", "mountain"),
    ],
)
def test_a_concept_is_what_is_shown(text: str, concept: str) -> None:
    assert concept_of(text) == concept


def test_a_flag_has_one_concept_in_every_set() -> None:
    drawn = _emoji({"label": "flag: Angola", "hexcode": "1F1E6-1F1F4"})
    assert (drawn.text, drawn.concept) == ("flag of Angola", flag_concept("AO"))


@pytest.mark.parametrize("info", DOMAINS.values(), ids=str)
def test_notice_attributes_every_domain(info: DomainInfo) -> None:
    notice = " ".join((ROOT / "NOTICE").read_text().split())
    assert f" {info.name} " in notice
    assert info.licence in notice
    for package in info.packages:
        assert package.name in notice


def test_one_split_is_drawn_alone_with_the_rows_that_it_has_in_the_whole(tmp_path: Path) -> None:
    whole = read_folder(build(toy(), tmp_path / "whole"), split="test")
    drawn: list[str] = []

    def watched() -> Iterator[Draft]:
        for each in drafts():
            yield replace(each, picture=partial(_noted, each, drawn))

    part = read_folder(build(toy(watched), tmp_path / "part", "test"))
    assert [(item.path.name, item.text, item.bytes()) for item in part] == [
        (item.path.name, item.text, item.bytes()) for item in whole
    ]
    assert set(drawn) == {item.path.stem for item in part}


def _noted(draft: Draft, drawn: list[str]) -> Image.Image:
    drawn.append(draft.name)
    return draft.picture()


def test_a_split_is_enough_for_whoever_wants_it_and_becomes_the_whole_when_more_is_wanted(tmp_path: Path) -> None:
    folder = build(toy(), tmp_path, "test")
    before = content(folder)
    assert build(toy(partial(_fail, "drawn again")), tmp_path, "test") == folder
    assert content(folder) == before
    build(toy(), tmp_path)
    assert len(read_folder(folder)) == 151
    for split in (None, "train", "test"):
        build(toy(partial(_fail, "drawn again")), tmp_path, split)


def _fail(reason: str) -> Iterator[Draft]:
    raise AssertionError(reason)


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
