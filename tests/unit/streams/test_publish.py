from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.errors import BrokerError, ConfigError, RecordError
from core.settings import Settings
from ops.cli.main import app
from streams.publish.folders import FolderItem
from streams.publish.publisher import MAX_BYTES, MAX_ROWS, InFlight, ProgressFile, _checked, publish
from tests.support.pictures import png

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


def test_all_answers_of_a_question_are_sent() -> None:
    item = FolderItem(Path("a.png"), "", question="what?", answer="boat", answers=("boat", "ship"), inline=png())
    assert _checked(item, "row 1", Settings(), None).extra == {"answers": ["boat", "ship"]}
    alone = replace(item, answers=("boat",))
    assert _checked(alone, "row 1", Settings(), None).extra == {}


def test_a_dry_run_refuses_what_ingest_would_and_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    tiny = base64.b64encode(png(size=(2, 2))).decode()
    contents = [{"image": tiny, "text": "x"}, {"image": "AAAA", "text": "x"}, {"image": PICTURE, "text": "x" * 3000}]
    file.write_text("\n".join(map(json.dumps, contents)))
    report = dry(tmp_path, file)
    assert report.refused == {"image_too_small": 1, "image_format": 1, "text_too_long": 1}
    assert "line 1, field 'image'" in report.examples[0] and "line 3, field 'text'" in report.examples[2]


@pytest.mark.parametrize(("bad", "status"), [([], 0), ([1], 3), ([0, 1, 2], 4)])
def test_the_exit_status_tells_what_was_refused(tmp_path: Path, bad: list[int], status: int) -> None:
    file = rows(tmp_path / "a.jsonl", bad=bad)
    result = CliRunner().invoke(app, ["--set", f"home={tmp_path}", "publish", str(file), "--dry-run"])
    assert result.exit_code == status, result.output


def test_done_is_what_lies_before_the_first_row_in_flight() -> None:
    window = InFlight(done=10)
    for number in (11, 12, 13):
        window.add(number, 1)
    window.pass_over(14)
    for number, done in ((12, 10), (11, 12), (13, 14)):
        window.acknowledged(number)
        assert window.done == done


@pytest.mark.parametrize(("sizes", "more"), [([1] * MAX_ROWS, 1), ([MAX_BYTES - 5], 6)])
def test_a_row_waits_while_too_many_rows_or_bytes_are_in_flight(sizes: list[int], more: int) -> None:
    window = InFlight()
    for number, size in enumerate(sizes, start=1):
        window.add(number, size)
    waiting = threading.Thread(target=window.add, args=(len(sizes) + 1, more))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    window.acknowledged(1)
    waiting.join(60)
    assert not waiting.is_alive()


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
