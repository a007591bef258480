from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from core.errors import RecordError
from streams.publish.folders import INDEX, FolderItem, read_folder, write_folder
from tests.support.datasets import error_of, items_of
from tests.support.pictures import png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "birds"
    (root / "photos").mkdir(parents=True)
    (root / "photos" / "a.png").write_bytes(png())
    (root / "photos" / "b.png").write_bytes(png("blue"))
    return root


def index(root: Path, *lines: str) -> Path:
    (root / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_every_column_is_read_in_any_order(folder: Path) -> None:
    header = "text,file,tags,time,source,domain,split,concept,label,answer,question,colour"
    row = "a crane,photos/a.png,red; tall ;,2026-01-31T13:00:00+01:00,zoo,zoos,test,crane,bird,two,how many legs,x"
    (item,) = read_folder(index(folder, header, row))
    assert (item.label, item.concept, item.split, item.domain, item.source) == ("bird", "crane", "test", "zoos", "zoo")
    assert (item.question, item.answer, item.tags) == ("how many legs", "two", ("red", "tall"))
    assert item.time == "2026-01-31T12:00:00+00:00"


def test_a_row_without_split_belongs_to_every_split_and_an_unknown_one_lists_those_there_are(folder: Path) -> None:
    index(folder, "file,text,split", "photos/a.png,one,test", "photos/b.png,two,")
    assert [item.text for item in read_folder(folder, "test")] == ["one", "two"]
    assert [item.text for item in read_folder(folder, "train")] == ["two"]
    index(folder, "file,text,split", "photos/a.png,one,test", "photos/b.png,two,train")
    with pytest.raises(RecordError, match=r"nothing in split 'dev'; it has: test, train"):
        read_folder(folder, "dev")


def test_what_is_written_reads_back_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    fields = {
        "text": 'a "red"\nsquare, é', "label": "square", "concept": "square", "split": "train", "domain": "shapes",
        "source": "test", "time": "2026-01-31T12:00:00+00:00", "tags": ("red", "flat"), "question": "which colour?",
        "answer": "red", "answers": ("red", "rot"),
    }  # fmt: skip
    items = [FolderItem(path=Path("in/a.png"), **fields, inline=png())]
    first, second = (write_folder(tmp_path / name, items) for name in ("one", "two"))
    (item,) = read_folder(first)
    assert item.bytes() == png() and {name: getattr(item, name) for name in fields} == fields
    assert (first / INDEX).read_bytes() == (second / INDEX).read_bytes()
    assert sorted(path.name for path in first.iterdir()) == [INDEX, "in"]
    with pytest.raises(RecordError, match="leads out"):
        write_folder(tmp_path / "in", [FolderItem(path=Path("../a.png"), text="x", inline=png())])
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "in" / INDEX).exists()


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ("photos/none.png,x,", "file", "does not exist"),
        ("photos,x,", "file", "does not exist"),
        ("../outside.png,x,", "file", "leads out"),
        ("photos/../../outside.png,x,", "file", "leads out"),
        ("/etc/hostname,x,", "file", "leads out"),
        ("photos\\a.png,x,", "file", "leads out"),
        ("link.png,x,", "file", "link out of the folder"),
        (",x,", "file", "is empty"),
        ("photos/a.png,,", "text", "is empty"),
        ("photos/a.png,x,yesterday", "time", "ISO 8601"),
        ("photos/a.png,one, two,", "time", "more values than columns"),
    ],
)
def test_an_error_names_file_line_field_and_fix(folder: Path, row: str, field: str, said: str) -> None:
    (folder.parent / "outside.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    index(folder, "file,text,time", "photos/a.png,fine,", row)
    with pytest.raises(RecordError) as caught:
        read_folder(folder)
    assert f"{folder / INDEX}, line 3, field '{field}'" in caught.value.message and said in caught.value.message
    assert caught.value.fix and caught.value.reason == "dataset"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"file;text\nphotos/a.png;x\n", "separate the columns by commas"),
        (b"path,caption\na,b\n", "no such column"),
        (b"", "no such column"),
        (b"file,text\nphotos/a.png,caf\xe9\n", "not UTF-8"),
        (b'file,text\nphotos/a.png,"never closed\n', "after line 1"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(folder: Path, content: bytes, said: str) -> None:
    (folder / INDEX).write_bytes(content)
    with pytest.raises(RecordError, match=f"(?i){said}"):
        read_folder(folder)


def test_question_and_answer_come_together_and_there_may_be_several_answers(folder: Path) -> None:
    with pytest.raises(RecordError, match="field 'answer'"):
        read_folder(index(folder, "file,text,question", "photos/a.png,,what is it?"))
    header, row = "file,text,question,answer,answers", "photos/a.png,,what colour?,grey,grey; gray;"
    (item,) = read_folder(index(folder, header, row))
    assert (item.text, item.answer, item.answers) == ("", "grey", ("grey", "gray"))
    with pytest.raises(RecordError, match="the limit is 10"):
        item.bytes(max_bytes=10)


def test_jsonl_holds_paths_and_images(folder: Path) -> None:
    encoded = base64.b64encode(png("blue")).decode()
    rows = [
        {"file": "photos/a.png", "text": "by path", "tags": ["red", "flat"], "label": None},
        {"image": encoded, "text": "in the row"},
        {"image": f"data:image/png;base64,{encoded}", "text": "as a URI"},
    ]
    (folder / "more.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    items = items_of(folder / "more.jsonl")
    assert [item.bytes() for item in items] == [png(), png("blue"), png("blue")]
    assert items[0].tags == ("red", "flat") and {item.domain for item in items} == {"more"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"image": "%%%", "text": "x"}', "field 'image': not base64"),
        ('{"image": "data:image/png,xx", "text": "x"}', "field 'image': is a data: URI, not in base64"),
        ('{"image": "AAAA", "file": "photos/a.png", "text": "x"}', "both file and image"),
        ('{"file": "photos/a.png", "text": 3}', "field 'text': is a int"),
        ('{"file": "photos/a.png", "text": "x", "tags": [1]}', "field 'tags'"),
        ('{"text": "x"}', "field 'file': is empty"),
        ("[1, 2]", "holds a list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_jsonl_row_is_named(folder: Path, row: str, said: str) -> None:
    file = folder / "more.jsonl"
    file.write_text('{"file": "photos/a.png", "text": "fine"}\n' + row)
    told = error_of(file).message
    assert "line 2" in told and said in told


@pytest.mark.parametrize("name", ["nowhere", "empty", "notes.txt"])
def test_what_is_no_dataset_is_refused_with_a_fix(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RecordError, match=name) as caught:
        items_of(tmp_path / name)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["more.csv", "more.jsonl"])
def test_a_row_may_hold_an_image_and_without_end_is_not_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = bytes(range(256)) * 1024  # beyond the limit of Python's own reader
    begin, end = {"more.csv": ('image,text\n"', '",noise\n'), "more.jsonl": ('{"image": "', '", "text": "noise"}')}[
        name
    ]
    (tmp_path / name).write_text(begin + base64.b64encode(noise).decode() + end)
    assert [item.bytes() for item in items_of(tmp_path / name)] == [noise]
    monkeypatch.setattr("streams.publish.folders.MAX_ROW_CHARS", 1000)
    (tmp_path / name).write_text(begin + "x" * 5000)
    with pytest.raises(RecordError, match="1000"):
        items_of(tmp_path / name)
