"""COCO captions and LLaVA: read like their own tools read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from core.errors import RecordError
from streams.publish.datasets import detect
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png


def document(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


def coco(root: Path, captions_first: bool = False, **changes: Any) -> Path:
    """The layout of COCO 2017."""
    for number in (9, 25):
        image(root / f"train2017/{number:012d}.jpg", "red" if number == 9 else "blue")
    content: dict[str, Any] = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "a", "url": "b"}],
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "height": 8, "width": 8, "license": 1} for n in (9, 25)],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "a red square"},
            {"image_id": 25, "id": 2, "caption": "a blue square "},
            {"image_id": 9, "id": 3, "caption": "something red"},
        ],
    } | changes
    if captions_first:
        content = dict(reversed(content.items()))
    return document(root / "annotations/captions_train2017.json", content)


@pytest.mark.parametrize("captions_first", [False, True])
def test_coco_captions_are_those_that_pycocotools_reads(tmp_path: Path, captions_first: bool) -> None:
    file = coco(tmp_path, captions_first)
    theirs = COCO(str(file))
    expected = [
        (theirs.loadImgs(each["image_id"])[0]["file_name"], each["caption"].strip())
        for each in theirs.loadAnns(theirs.getAnnIds())
    ]
    for path in (file, tmp_path):
        assert detect(path).name == "coco"
        assert [(item.path.name, item.text) for item in items_of(path)] == expected
    item = items_of(file)[1]
    assert (item.bytes(), item.split) == (png("blue"), "train")


def test_of_several_coco_files_the_captions_are_read(tmp_path: Path) -> None:
    file = coco(tmp_path)
    boxes = {"images": json.loads(file.read_text())["images"], "annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]}
    document(file.with_name("instances_train2017.json"), boxes)
    assert len(items_of(tmp_path)) == 3
    assert "field 'caption': there is none" in error_of(file.with_name("instances_train2017.json")).message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"image_id": 7, "caption": "x"}]}, "field 'image_id': 7 is none of the images"),
        ({"annotations": ["x"]}, "annotation 1: is no object"),
        (
            {"images": [{"id": 7, "file_name": "none.jpg"}], "annotations": [{"image_id": 7, "caption": "x"}]},
            "not exist",
        ),
        (
            {"images": [{"id": 7, "file_name": "../x.jpg"}], "annotations": [{"image_id": 7, "caption": "x"}]},
            "leads out",
        ),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    image(tmp_path.parent / "x.jpg")
    assert said in error_of(coco(tmp_path, **changes), format="coco").message


LLAVA = {
    "id": "000000000009",
    "image": "coco/train2017/000000000009.jpg",
    "conversations": [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "A square."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_every_turn_of_a_llava_conversation_is_a_sample_of_the_image(tmp_path: Path, name: str) -> None:
    image(tmp_path / "images/coco/train2017/000000000009.jpg")
    file = tmp_path / name
    file.write_text(json.dumps([LLAVA] if name.endswith("json") else LLAVA))
    assert detect(file).name == "llava"
    items = items_of(file)
    assert [(item.question, item.answer) for item in items] == [("What is it?", "A square."), ("Which colour?", "Red.")]
    assert {item.bytes() for item in items} == {png()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": None}, "element 2, field 'image': there is none"),
        ({"image": "/etc/passwd"}, "leads out"),
        ({"conversations": [{"from": "gpt", "value": "Red."}]}, "no question with its answer"),
        ({"conversations": [{"from": "human"}]}, "a turn without speaker or words"),
        ({"conversations": "hello"}, "is not a list of turns"),
    ],
)
def test_a_wrong_conversation_is_named_and_the_next_is_read(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    image(tmp_path / "coco/train2017/000000000009.jpg")
    items, [error] = items_and_errors(document(tmp_path / "a.json", [LLAVA, LLAVA | change, LLAVA]))
    assert len(items) == 4 and said in error.message and error.fix


def test_a_document_that_breaks_off_ends_the_reading_with_its_place(tmp_path: Path) -> None:
    image(tmp_path / "coco/train2017/000000000009.jpg")
    file = document(tmp_path / "a.json", [LLAVA, LLAVA])
    file.write_text(file.read_text()[:-30])
    with pytest.raises(RecordError, match="after element 1: not JSON"):
        items_and_errors(file, format="llava")
