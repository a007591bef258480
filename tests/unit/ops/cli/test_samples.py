from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import RatchetError, RecordError, UnknownRecord
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.command_line import ratchet
from tests.support.kafka import picture
from tests.unit.streams.test_export import WHEN, sample_row

NASTY = "<script>alert(1)</script> [bold]x[/bold] \x1b[31m"
IDS = [sample_row(number)["id"] for number in range(3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    refused = {
        "kind": "quarantine", "topic": "t", "partition": 0, "offset": 3, "reason": "schema", "source": "cam 7",
        "detail": "field 'x'", "ingested_at": WHEN, "original": b"{}", "original_headers": "[]",
    }  # fmt: skip
    rows = [sample_row(0), sample_row(1, domain=NASTY), sample_row(2, image=b"broken"), refused]
    SampleStore(str(home / "lake")).put(rows, [Position("t", 0, 4)])
    return home


def shown(home: Path, *words: str) -> str:
    return ratchet(home, *words).output


def as_json(home: Path, *words: str) -> Any:
    return json.loads(shown(home, *words, "--json"))


def test_a_record_is_traced_by_position_and_by_id(home: Path) -> None:
    text = shown(home, "samples", "trace", "t:0:3")
    for fact in ("t:0:3", "refused", "reason: schema", "field 'x'", "source: cam 7"):
        assert fact in text
    [receipt] = as_json(home, "samples", "trace", "--id", IDS[0][:12])
    assert (receipt["outcome"], receipt["id"], receipt["position"]) == ("stored", IDS[0], "t:0:0")
    assert "not_read_yet" in shown(home, "samples", "trace", "t:0:4")


def test_what_cannot_be_traced_is_said(home: Path) -> None:
    with pytest.raises(UnknownRecord, match="no record has the id"):
        shown(home, "samples", "trace", "--id", "f" * 64)
    with pytest.raises(RecordError, match="topic:partition:offset"):
        shown(home, "samples", "trace", "t:0")
    assert "give a position, or --id" in shown(home, "samples", "trace")
    assert "give a position, or --id" in shown(home, "samples", "trace", "t:0:0", "--id", IDS[0])


def test_samples_are_listed_by_filter_and_text_from_outside_is_shown_as_text(home: Path) -> None:
    assert [row["id"] for row in as_json(home, "samples", "list", "--source", "cam 0")] == [IDS[2], IDS[0]]
    assert [row["id"] for row in as_json(home, "samples", "list", "--text", "boat 1", "--since", "2020-01-01")] == [
        IDS[1]
    ]
    text = shown(home, "samples", "list", "--limit", "2")
    assert "[bold]x[/bold]" in text
    assert "\x1b" not in text
    assert IDS[0][:12] not in text
    assert "is not a time" in shown(home, "samples", "list", "--since", "yesterday")


def test_a_sample_is_shown_and_its_image_saved(home: Path, tmp_path: Path) -> None:
    sample = as_json(home, "samples", "show", IDS[1][:10], "--image", str(tmp_path / "image"))
    assert (sample["id"], sample["concept"], sample["tags"], sample["record"]) == (IDS[1], "boat", "a b, c", "t:0:1")
    assert sample["thumbnail"].endswith(f"/samples/{IDS[1]}.png")
    assert (tmp_path / "image").read_bytes() == picture(1, kind="JPEG")
    with pytest.raises(UnknownRecord, match="no sample"):
        shown(home, "samples", "show", "f" * 64)


def test_a_page_holds_thumbnails_and_no_script(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "3 samples" in shown(home, "samples", "list", "--html", str(page))
    text = page.read_text("utf-8")
    assert text.count('src="data:image/jpeg;base64,') == 2
    assert text.count("no picture") == 1  # the image that is broken
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    with pytest.raises(RatchetError, match="cannot be written"):
        shown(home, "samples", "show", IDS[0], "--html", str(tmp_path / "none" / "page.html"))


def test_stats_count_by_what_there_is(home: Path) -> None:
    found = as_json(home, "samples", "stats")
    assert (found["sample"], found["train"], found["quarantine"]) == (3, 3, 1)
    assert found["samples by source"] == {"cam 0": 2, "cam 1": 1}
    assert found["refused records by source"] == {"cam 7": 1}
    assert "refused records by reason" in shown(home, "samples", "stats")


def test_refused_records_are_listed_by_reason_and_source(home: Path) -> None:
    text = shown(home, "quarantine", "list", "--source", "cam 7")
    assert "t:0:3" in text and "refused records by source" in text
    assert as_json(home, "quarantine", "list", "--source", "other") == []
    assert "--refused-for is one of" in shown(home, "quarantine", "list", "--refused-for", "nonsense")


def test_samples_are_exported(home: Path, tmp_path: Path) -> None:
    assert "2 samples" in shown(home, "samples", "export", str(tmp_path / "out.tar"), "--source", "cam 0")
    assert (tmp_path / "out.tar").stat().st_size > 0


def test_an_empty_store_has_nothing_to_show(tmp_path: Path) -> None:
    assert as_json(tmp_path, "samples", "list") == []
    assert as_json(tmp_path, "samples", "stats")["sample"] == 0
    assert as_json(tmp_path, "quarantine", "list") == []
