from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import BrokerError, ConfigError, RecordError
from core.settings import Settings
from streams.publish.folders import INDEX, FolderItem, read_folder, write_folder
from streams.publish.publisher import InFlight, ProgressFile, _checked, publish
from tests.support.datasets import items_of
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


def test_every_column_is_read_in_any_order_and_question_and_answer_come_together(folder: Path) -> None:
    header = "text,file,tags,time,source,domain,split,concept,label,answer,question,colour"
    row = "a crane,photos/a.png,red; tall ;,2026-01-31T13:00:00+01:00,zoo,zoos,test,crane,bird,two,how many legs,x"
    (item,) = read_folder(index(folder, header, row))
    assert (item.label, item.concept, item.split, item.domain, item.source) == ("bird", "crane", "test", "zoos", "zoo")
    assert (item.question, item.answer, item.tags) == ("how many legs", "two", ("red", "tall"))
    assert item.time == "2026-01-31T12:00:00+00:00"
    with pytest.raises(RecordError, match="the limit is 10"):
        item.bytes(max_bytes=10)
    with pytest.raises(RecordError, match="field 'answer'"):
        read_folder(index(folder, "file,text,question", "photos/a.png,,what is it?"))
    header, row = "file,text,question,answer,answers", "photos/a.png,,what colour?,grey,grey; gray;"
    (item,) = read_folder(index(folder, header, row))
    assert (item.text, item.answer, item.answers) == ("", "grey", ("grey", "gray"))


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
        ("../outside.png,x,", "file", "leads out"),
        ("photos/../../outside.png,x,", "file", "leads out"),
        ("/etc/hostname,x,", "file", "leads out"),
        ("photos\\a.png,x,", "file", "leads out"),
        ("link.png,x,", "file", "link out of the folder"),
        (",x,", "file", "is empty"),
        ("photos/a.png,,", "text", "is empty"),
        ("photos/a.png,x,yesterday", "time", "ISO 8601"),
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


PICTURE = base64.b64encode(png()).decode()


def rows(path: Path, count: int = 3, bad: Iterable[int] = ()) -> Path:
    """A JSON Lines file; the texts of bad rows are empty."""
    texts = ["" if number in bad else f"row {number}" for number in range(count)]
    path.write_text("".join(json.dumps({"image": PICTURE, "text": text}) + "\n" for text in texts))
    return path


def dry(tmp_path: Path, path: Path, **options: Any) -> Any:
    return publish(Settings(home=tmp_path / "home"), path, dry_run=True, **options)


def test_a_dry_run_checks_all_rows_counts_shows_some_and_writes_what_is_refused(tmp_path: Path) -> None:
    report = dry(tmp_path, rows(tmp_path / "a.jsonl", 8, bad=[2, 4]), rejects=tmp_path / "bad.jsonl")
    assert (report.delivered, report.format, report.size) == (6, "jsonl", 6 * len(png()))
    assert len(report.samples) == 5 and "line 1: row 0" in report.samples[0]
    assert report.refused == {"dataset": 2} and "line 3, field 'text': is empty" in report.examples[0]
    assert "nothing was sent" in str(report)
    assert not (tmp_path / "home/publish").exists()
    written = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(each["row"], each["place"].rpartition(", ")[2]) for each in written] == [(3, "line 3"), (5, "line 5")]
    assert all(each["reason"] == "dataset" and "is empty" in each["message"] and each["fix"] for each in written)
    with pytest.raises(ConfigError, match="cannot be written"):
        dry(tmp_path, tmp_path / "a.jsonl", rejects=tmp_path / "none/bad.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match="has no rows"):
        dry(tmp_path, tmp_path / "empty.jsonl")


def test_a_dry_run_refuses_what_ingest_would_and_all_answers_of_a_question_are_sent(tmp_path: Path) -> None:
    tiny = base64.b64encode(png(size=(2, 2))).decode()
    contents = [{"image": tiny, "text": "x"}, {"image": "AAAA", "text": "x"}, {"image": PICTURE, "text": "x" * 3000}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, contents)))
    report = dry(tmp_path, tmp_path / "a.jsonl")
    assert report.refused == {"image_too_small": 1, "image_format": 1, "text_too_long": 1}
    assert "line 1, field 'image'" in report.examples[0] and "line 3, field 'text'" in report.examples[2]
    item = FolderItem(Path("a.png"), "", question="what?", answer="boat", answers=("boat", "ship"), inline=png())
    assert _checked(item, "row 1", Settings(), None).extra == {"answers": ["boat", "ship"]}
    assert _checked(replace(item, answers=("boat",)), "row 1", Settings(), None).extra == {}


def test_done_is_what_lies_before_the_first_row_in_flight() -> None:
    window = InFlight(done=10)
    for number in (11, 12, 13):
        window.add(number, 1)
    window.pass_over(14)
    for number, done in ((12, 10), (11, 12), (13, 14)):
        window.acknowledged(number)
        assert window.done == done


def test_a_row_that_was_not_delivered_ends_it_and_is_not_done() -> None:
    window = InFlight()
    for number in (1, 2):
        window.add(number, 1)
    window.failed(BrokerError("no"))
    window.acknowledged(2)
    assert window.done == 0
    for go_on in (lambda: window.add(3, 1), lambda: window.wait_empty(1)):
        with pytest.raises(BrokerError):
            go_on()


def test_progress_is_written_when_enough_rows_are_done_and_damaged_it_is_an_error_with_a_fix(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path, "a", "jsonl", "t", "", "b:1")
    for number in range(1, 6):
        progress.note(number, f"line {number}")
    progress.save(2, every=3)
    assert progress.load().done == 0
    progress.save(4, every=3)
    assert (progress.load().done, progress.load().place) == (4, "line 4")
    assert [path.name for path in progress.file.parent.iterdir()] == [progress.file.name]
    for content in ("", "{}", '{"done": "x"}', '{"done": -1}', "[1]"):
        progress.file.write_text(content)
        with pytest.raises(ConfigError, match="Delete it"):
            progress.load()
