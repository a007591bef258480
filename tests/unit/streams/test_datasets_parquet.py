"""Parquet as Hugging Face's datasets and img2dataset write it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from core.errors import RecordError
from streams.publish.datasets import detect
from tests.support.datasets import error_of, items_and_errors, items_of
from tests.support.pictures import png

IMG2DATASET = Path(__file__).parent / "img2dataset"
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


def test_what_img2dataset_could_not_download_is_named() -> None:
    folder = IMG2DATASET / "parquet"
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
