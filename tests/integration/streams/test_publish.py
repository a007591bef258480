"""Publishing to a broker: every row once, and after a kill only what was in flight again."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.errors import ConfigError, RecordError, StoreUnavailable
from core.settings import Settings
from ops.cli.main import app
from streams.publish.publisher import MAX_ROWS, SAVE_ROWS, publish, wait_until_stored
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, picture, read_topic, reading, wait_for

PICTURE = base64.b64encode(picture(1)).decode()


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    own = broker.settings(tmp_path / "home")
    make_topics(own)
    return own


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.jsonl"


def write_rows(file: Path, count: int, bad: Iterable[int] = ()) -> None:
    with file.open("w") as stream:
        for number in range(count):
            stream.write(json.dumps({"image": PICTURE, "text": "" if number in bad else f"row {number}"}) + "\n")


def texts(settings: Settings, at_least: int = 0) -> Counter[str]:
    records = read_topic(settings.kafka, settings.kafka.topic, at_least)
    return Counter(dict(record.headers)["ratchet_text"].decode() for record in records)


def expected(numbers: Iterable[int]) -> dict[str, int]:
    return {f"row {number}": 1 for number in numbers}


def command(settings: Settings, file: Path, *words: str) -> list[str]:
    kafka = settings.kafka
    values = [f"home={settings.home}", f"kafka.bootstrap={kafka.bootstrap}", f"kafka.topic={kafka.topic}"]
    return [*(word for value in values for word in ("--set", value)), "publish", str(file), *words]


def test_the_first_bad_row_ends_it_a_resumed_run_begins_there_and_a_limit_goes_on_from_run_to_run(
    settings: Settings, file: Path
) -> None:
    write_rows(file, 20, bad=[7])
    with pytest.raises(RecordError, match=r"line 8, field 'text': is empty.*--skip-bad"):
        publish(settings, file)
    assert texts(settings, 7) == expected(range(7))
    write_rows(file, 20)
    reports = [publish(settings, file, limit=6, resume=True) for _ in range(4)]
    assert [(report.before, report.delivered) for report in reports] == [(7, 6), (13, 6), (19, 1), (20, 0)]
    assert {report.exit_status for report in reports} == {0}
    assert texts(settings, 20) == expected(range(20))
    write_rows(file, 4)
    with pytest.raises(ConfigError, match=r"has changed: row 20 was .*line 20, and now there is only 4 rows"):
        publish(settings, file, resume=True)


def test_bad_rows_are_left_out_and_written_and_the_status_tells(settings: Settings, file: Path, tmp_path: Path) -> None:
    write_rows(file, 20, bad=[0, 9])
    rejects = tmp_path / "bad.jsonl"
    for words, status in (([], 1), (["--skip-bad", "--rejects", str(rejects)], 3)):
        result = CliRunner().invoke(app, command(settings, file, *words))
        assert result.exit_code == status, result.output
    assert len(rejects.read_text().splitlines()) == 2
    assert texts(settings, 18) == expected(set(range(20)) - {0, 9})


def test_after_a_kill_nothing_is_lost_and_only_what_was_in_flight_is_sent_again(settings: Settings, file: Path) -> None:
    count = 4000
    write_rows(file, count)
    words = [sys.executable, "-m", "ops.cli.main", *command(settings, file)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: any((settings.home / "publish").glob("[!.]*.json")), "the first file of progress")
        killed.kill()
    report = publish(settings, file, resume=True)
    assert report.before >= SAVE_ROWS and report.delivered > 0
    assert report.before + report.delivered == count
    arrived = texts(settings, count)
    assert len(arrived) == count
    again = [int(text.split()[1]) for text, times in arrived.items() if times > 1]
    assert arrived.total() - count == len(again) <= MAX_ROWS + SAVE_ROWS
    assert all(number >= report.before for number in again)


def test_waiting_ends_when_ingest_has_dealt_with_everything(settings: Settings, file: Path) -> None:
    write_rows(file, 20)
    report = publish(settings, file)
    with pytest.raises(StoreUnavailable, match="20 records are left"):
        wait_until_stored(settings, report.last, seconds=0.1)
    with reading(settings):
        wait_until_stored(settings, report.last, seconds=60)
    assert SampleStore(settings.lake).tally()["duplicate"] == 0
    assert sum(SampleStore(settings.lake).offsets().values()) == 20
