"""COCO captions, VQAv2 and LLaVA: read like their own tools read them, and bounded."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from core.errors import RecordError
from streams.publish.datasets import detect
from streams.publish.datasets.json_stream import DiskIndex, elements
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


def vqa(root: Path) -> tuple[Path, Path]:
    """The layout of VQAv2."""
    image(root / "train2014/COCO_train2014_000000000009.jpg")
    about = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "train2014"}
    asked = [
        {"image_id": 9, "question": "What colour is it?", "question_id": 9000},
        {"image_id": 9, "question": "Is it round?", "question_id": 9001},
    ]
    said = [["red", "red", "crimson"], ["no", "no", "no"]]
    answers = [
        {
            "question_type": "what",
            "multiple_choice_answer": texts[0],
            "answers": [{"answer": t, "answer_confidence": "yes", "answer_id": n} for n, t in enumerate(texts, 1)],
            "image_id": 9,
            "answer_type": "other",
            "question_id": 9000 + number,
        }
        for number, texts in enumerate(said)
    ]
    return (
        document(root / "v2_OpenEnded_mscoco_train2014_questions.json", {**about, "questions": asked}),
        document(root / "v2_mscoco_train2014_annotations.json", {**about, "annotations": answers}),
    )


def test_vqa_questions_and_annotations_are_joined(tmp_path: Path) -> None:
    for path in (tmp_path, *vqa(tmp_path)):
        assert detect(path).name == "vqa"
        items = items_of(path)
        assert [(item.question, item.answer) for item in items] == [
            ("What colour is it?", "red"),
            ("Is it round?", "no"),
        ]
        assert (items[0].answers, items[0].label, items[0].split) == (("red", "crimson"), "other", "train")
        assert items[0].bytes() == png()


def test_half_of_a_vqa_data_set_is_refused(tmp_path: Path) -> None:
    questions, annotations = vqa(tmp_path)
    annotations.unlink()
    with pytest.raises(RecordError, match="half of a VQA data set"):
        items_of(questions)


def test_answers_to_no_question_are_named(tmp_path: Path) -> None:
    questions, annotations = vqa(tmp_path)
    content = json.loads(questions.read_text())
    document(questions, content | {"questions": content["questions"][1:]})
    items, [error] = items_and_errors(annotations)
    assert len(items) == 1 and "annotation 1, field 'question_id': 9000 is none of the questions" in error.message


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


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"a":' * 100_000, '{"a": [' * 40 + "]}" * 40])
def test_a_document_that_is_too_deep_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match="nested deeper"):
        list(elements(tmp_path / "a.json", ("",)))


def test_an_element_that_is_too_large_is_refused_before_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.publish.datasets.json_stream.MAX_ELEMENT_BYTES", 2**20)
    with (tmp_path / "a.json").open("w") as stream:
        stream.write('[{"a": "')
        for _ in range(16):
            stream.write("x" * 2**20)
        stream.write('"}]')
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="an element of more than"):
            list(elements(tmp_path / "a.json", ("",)))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_the_index_on_disk_finds_what_was_put() -> None:
    with DiskIndex() as index:
        for number in range(25_000):
            index.put(number, f"value {number}")
        index.put(7, "newer")
        assert (index.get(24_999), index.get(7), index.get("no")) == ("value 24999", "newer", None)


def test_a_folder_of_unknown_json_is_no_data_set(tmp_path: Path) -> None:
    document(tmp_path / "package.json", {"name": "x", "images": "y"})
    with pytest.raises(RecordError, match="no data set that is known") as caught:
        detect(tmp_path)
    assert "webdataset" in caught.value.fix
