from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from pycocotools.coco import COCO

from core.errors import RecordError
from streams.publish.datasets import detect
from streams.publish.datasets.json_annotations import elements
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png

datasets.disable_progress_bars()


def hugging_face(path: Path, rows: dict[str, list[Any]], **features: Any) -> Path:
    Dataset.from_dict(rows, features=Features({"image": Image(), **features})).to_parquet(str(path))
    return path


def picture(colour: str) -> Pillow.Image:
    return Pillow.open(io.BytesIO(png(colour)))


def test_images_and_captions_of_a_hugging_face_data_set_are_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, colours in (("train", ["red", "blue"]), ("test", ["green"])):
        rows = {"image": [picture(each) for each in colours], "caption": [f"a {each} square" for each in colours]}
        hugging_face(tmp_path / f"data/{split}-00000-of-00001.parquet", rows, caption=Value("string"))
    assert detect(tmp_path).name == "parquet"
    items = items_of(tmp_path)
    assert [(item.text, item.split) for item in items] == [
        ("a green square", "test"),
        ("a red square", "train"),
        ("a blue square", "train"),
    ]
    assert Pillow.open(io.BytesIO(items[1].bytes())).getpixel((0, 0)) == (255, 0, 0)
    assert [item.text for item in items_of(tmp_path, split="test")] == ["a green square"]


def test_numbers_of_classes_become_their_names(tmp_path: Path) -> None:
    rows = {"image": [picture("red"), picture("blue")], "label": [1, 0]}
    file = hugging_face(tmp_path / "a.parquet", rows, label=ClassLabel(names=["sky_lark", "crane"]))
    assert [(item.label, item.text) for item in items_of(file)] == [("crane", "crane"), ("sky_lark", "sky lark")]


def test_questions_with_the_answers_of_many_take_what_most_said(tmp_path: Path) -> None:
    answers = [{"answer": text, "answer_id": n} for n, text in enumerate(["two", "2", "two"])]
    rows = {"image": [picture("red")], "question": ["how many?"], "answers": [answers]}
    kind = [{"answer": Value("string"), "answer_id": Value("int64")}]
    [item] = items_of(hugging_face(tmp_path / "a.parquet", rows, question=Value("string"), answers=kind))
    assert (item.question, item.answer, item.answers) == ("how many?", "two", ("two", "2"))


def test_what_img2dataset_could_not_download_is_named(img2dataset: Path) -> None:
    folder = img2dataset / "parquet"
    assert detect(folder).name == "parquet"
    items, [error] = items_and_errors(folder)
    assert {item.text for item in items} == {"a red square", "a green square", "a blue square"}
    assert "row 3, field 'jpg': was not downloaded: failed_to_download (HTTP Error 404" in error.message


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [b""], "text": ["x"]}, "field 'image': there is no image"),
        ({"image": [bytes(5000)], "text": ["x"]}, "5000 bytes, more than 4096"),
        ({"image": [png()], "text": [""]}, "field 'text': is empty"),
        ({"image": [png()], "text": [3]}, "field 'text': is a int"),
        ({"image": [png()], "question": ["q"], "answer": [""]}, "field 'answer': is empty"),
        ({"image": [{"path": "../a.png"}], "text": ["x"]}, "leads out of the folder"),
        ({"image": [{"path": "none.png"}], "text": ["x"]}, "does not exist"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    error = error_of(table(tmp_path / "a.parquet", **columns), max_image_bytes=4096)
    assert said in error.message and "row 1" in error.message


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"photo": ["a.png"], "text": ["x"]}, "no column of images"),
        ({"image": [png()], "n": [1]}, "no column of texts"),
    ],
)
def test_a_table_without_images_or_texts_is_refused_with_its_columns(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecordError, match=f"{said}; it has: {', '.join(columns)}"):
        items_of(table(tmp_path / "a.parquet", **columns))


def test_a_damaged_file_is_one_wrong_row_and_the_next_is_read(tmp_path: Path) -> None:
    damaged = table(tmp_path / "a.parquet", image=[png()] * 50, text=["x"] * 50)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    table(tmp_path / "b.parquet", image=[png()], text=["whole"])
    items, [error] = items_and_errors(tmp_path, format="parquet")
    assert [item.text for item in items] == ["whole"]
    assert str(damaged) in error.message and "damaged" in error.message


def test_text_that_is_no_utf8_is_one_wrong_row(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"caf\xe9", b"three"]).view(pa.string())
    items, [error] = items_and_errors(table(tmp_path / "a.parquet", image=[png()] * 3, text=texts))
    assert [item.text for item in items] == ["one", "three"]
    assert "row 2, field 'text': cannot be read" in error.message


def test_other_peoples_meaning_of_a_name_does_not_refuse_the_row(tmp_path: Path) -> None:
    others = {"source": [3], "time": ["noon"], "tags": [[1, 2]], "domain": [{"a": 1}], "concept": [1.5]}
    [item] = items_of(table(tmp_path / "a.parquet", image=[png()], text=["x"], **others))
    assert (item.source, item.time, item.tags, item.domain, item.concept) == ("", "", (), "a", "")


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
        ({"annotations": ["x"]}, "annotation 1: is not an object"),
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


@pytest.mark.parametrize("content", ["[" * 100_000, '[{"a":' * 100_000, '{"a": [' * 40 + "]}" * 40])
def test_a_document_that_is_too_deep_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RecordError, match="nested deeper"):
        list(elements(tmp_path / "a.json"))


def test_an_element_that_is_too_large_is_refused_before_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.publish.datasets.json_annotations.MAX_ELEMENT_BYTES", 2**20)
    with (tmp_path / "a.json").open("w") as stream:
        stream.write('[{"a": "')
        for _ in range(16):
            stream.write("x" * 2**20)
        stream.write('"}]')
    tracemalloc.start()
    try:
        with pytest.raises(RecordError, match="an element of more than"):
            list(elements(tmp_path / "a.json"))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
