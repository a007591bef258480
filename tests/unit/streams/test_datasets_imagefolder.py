"""Folders of images: classes as torchvision has them, metadata as Hugging Face has it; telling formats apart."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from torchvision.datasets import ImageFolder

from core.errors import RecordError
from streams.publish.datasets import FORMATS, detect
from streams.publish.folders import FolderItem, write_folder
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png


def images(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def test_class_folders_are_those_of_torchvision(tmp_path: Path) -> None:
    images(tmp_path, "red_fox/1.png", "red_fox/more/2.png", "crane/3.jpg")
    theirs = ImageFolder(str(tmp_path))
    assert detect(tmp_path).name == "imagefolder"
    ours = {str(item.path): item.label for item in items_of(tmp_path)}
    assert ours == {path: theirs.classes[number] for path, number in theirs.samples}
    assert {item.text for item in items_of(tmp_path)} == {"red fox", "crane"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_is_what_hugging_face_reads(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    root = images(tmp_path / "set", "train/a.png", "train/b/b.png")
    rows = [{"file_name": "a.png", "text": "one, two"}, {"file_name": "b/b.png", "text": "three"}]
    lines = ['file_name,text\na.png,"one, two"\nb/b.png,three\n'] if kind == "csv" else map(json.dumps, rows)
    (root / f"train/metadata.{kind}").write_text("\n".join(lines))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(tmp_path / "cache"))
    assert detect(root).name == "imagefolder"
    items = items_of(root)
    assert sorted(item.text for item in items) == sorted(theirs["text"]) == ["one, two", "three"]
    assert {item.split for item in items} == {"train"}


def test_wrong_metadata_rows_are_named_and_the_next_is_read(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    lines = ["file_name,text", "none.png,x", "../a.png,x", "a.png,", "a.png,caf\udce9", 'a.png,"x"y', "a.png,fine"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines), errors="surrogateescape")
    items, errors = items_and_errors(tmp_path)
    assert [item.text for item in items] == ["fine"]
    said = [
        "line 2, field 'file': 'none.png' does not",
        "leads out",
        "field 'text': is empty",
        "not UTF-8",
        "after line 5",
    ]
    for error, part in zip(errors, said, strict=True):
        assert part in error.message and error.fix


def test_metadata_without_texts_is_refused_with_its_columns(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,size\na.png,3\n")
    with pytest.raises(RecordError, match=r"the columns are \['file_name', 'size'\]"):
        items_of(tmp_path)


def test_an_image_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    images(tmp_path, "outside.png", "set/crane/a.png")
    (tmp_path / "set/crane/b.png").symlink_to(tmp_path / "outside.png")
    assert "link out of the folder" in error_of(tmp_path / "set").message


def test_ratchets_own_formats_are_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "own", [FolderItem(Path("a.png"), "x", inline=png())])
    (tmp_path / "rows.csv").write_text("file,text\nown/a.png,x\n")
    (tmp_path / "rows.jsonl").write_text('{"file": "own/a.png", "text": "x"}\n')
    names = {"own": "folder", "rows.csv": "csv", "rows.jsonl": "jsonl"}
    assert {path: detect(tmp_path / path).name for path in names} == names
    assert all(items_of(tmp_path / path)[0].bytes() == png() for path in names)


def test_a_format_can_be_forced_and_its_name_is_checked(tmp_path: Path) -> None:
    write_folder(tmp_path, [FolderItem(Path("crane/a.png"), "from the index", inline=png())])
    assert items_of(tmp_path)[0].text == "from the index"
    assert items_of(tmp_path, format="imagefolder")[0].text == "crane"
    with pytest.raises(RecordError, match="'zip' is no format") as caught:
        items_of(tmp_path, format="zip")
    assert all(name in caught.value.fix for name in FORMATS)
