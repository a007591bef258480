"""Samples, refused records and deletions on the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import RatchetError, SelectorError, UnknownRecord
from core.ledger import DeletionRow, Ledger
from core.settings import Settings
from ops.cli import context, samples
from streams.store import maintenance
from streams.store.deletion import Selected
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.command_line import ratchet
from tests.support.kafka import picture
from tests.support.samples import TOPIC, put, refusal, sample
from tests.unit.streams.test_export import sample_row

NASTY = "<script>alert(1)</script> [bold]x[/bold] \x1b[31m"
IDS = [sample_row(number)["id"] for number in range(3)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    refused = {**refusal(0, 3, b"{}", "schema"), "topic": "t", "source": "cam 7", "detail": "field 'x'"}
    rows = [sample_row(0), sample_row(1, domain=NASTY), sample_row(2, image=b"broken"), refused]
    SampleStore(str(home / "lake")).put(rows, [Position("t", 0, 4)])
    return home


def shown(home: Path, *words: str) -> str:
    return ratchet(home, *words).output


def as_json(home: Path, *words: str) -> Any:
    return json.loads(shown(home, *words, "--json"))


def test_samples_are_listed_counted_and_exported_and_texts_stay_texts(home: Path, tmp_path: Path) -> None:
    assert [row["id"] for row in as_json(home, "samples", "list", "--source", "cam 0")] == [IDS[2], IDS[0]]
    recent = ("--text", "boat 1", "--since", "2020-01-01")
    assert [row["id"] for row in as_json(home, "samples", "list", *recent)] == [IDS[1]]
    text = shown(home, "samples", "list", "--limit", "2")
    assert "[bold]x[/bold]" in text and "\x1b" not in text and IDS[0][:12] not in text
    assert "is not a time" in shown(home, "samples", "list", "--since", "yesterday")
    found = as_json(home, "samples", "stats")
    assert (found["sample"], found["train"], found["quarantine"]) == (3, 3, 1)
    assert found["samples by source"] == {"cam 0": 2, "cam 1": 1}
    assert found["refused records by source"] == {"cam 7": 1}
    assert "refused records by reason" in shown(home, "samples", "stats")
    text = shown(home, "quarantine", "list", "--source", "cam 7")
    assert "t:0:3" in text and "refused records by source" in text
    assert as_json(home, "quarantine", "list", "--source", "other") == []
    assert "--refused-for is one of" in shown(home, "quarantine", "list", "--refused-for", "nonsense")
    assert "2 samples" in shown(home, "samples", "export", str(tmp_path / "out.tar"), "--source", "cam 0")
    assert (tmp_path / "out.tar").stat().st_size > 0
    Ledger.open(f"sqlite:///{tmp_path}/ledger.db").close()
    assert as_json(tmp_path, "samples", "list") == as_json(tmp_path, "quarantine", "list") == []
    assert as_json(tmp_path, "samples", "stats")["sample"] == 0


def test_a_sample_is_shown_with_its_image_and_a_page_holds_thumbnails_and_no_script(home: Path, tmp_path: Path) -> None:
    found = as_json(home, "samples", "show", IDS[1][:10], "--image", str(tmp_path / "image"))
    assert (found["id"], found["concept"], found["tags"], found["record"]) == (IDS[1], "boat", "a b, c", "t:0:1")
    assert found["thumbnail"].endswith(f"/samples/{IDS[1]}.png")
    assert (tmp_path / "image").read_bytes() == picture(1, kind="JPEG")
    with pytest.raises(UnknownRecord, match="no sample"):
        shown(home, "samples", "show", "f" * 64)
    page = tmp_path / "page.html"
    assert "3 samples" in shown(home, "samples", "list", "--html", str(page))
    text = page.read_text("utf-8")
    assert text.count('src="data:image/jpeg;base64,') == 2
    assert text.count("no picture") == 1  # the image that is broken
    assert "<script" not in text and "&lt;script&gt;" in text and "default-src 'none'" in text
    with pytest.raises(RatchetError, match="cannot be written"):
        shown(home, "samples", "show", IDS[0], "--html", str(tmp_path / "none" / "page.html"))


# Deletions


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings.model_validate({"home": tmp_path, "maintain": {"keep_seconds": 0}, "kafka": {"events_topic": ""}})
    rows = [sample(0, 0, source="cam", key=b"user-1"), sample(0, 1, source="cam"), sample(0, 2, source="eye")]
    put(SampleStore(made.lake), [*rows, {**refusal(0, 3), "source": "cam"}], Position(TOPIC, 0, 4))
    return made


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger.open(settings.ledger)
    yield opened
    opened.close()


def requested(ledger: Ledger) -> DeletionRow:
    [row] = ledger.deletions()
    return row


def test_a_dry_run_says_how_much_and_a_deletion_is_confirmed_first(tmp_path: Path, ledger: Ledger) -> None:
    words = ("samples", "delete", "--source", "cam", "--reason", "consent withdrawn")
    assert "2 samples and 1 refused records are selected" in shown(tmp_path, *words, "--dry-run")
    for key, selected in (("user-1", 1), ("0x757365722D31", 1), ("user-2", 0)):
        assert f"{selected} samples" in shown(tmp_path, *words[:2], "--key", key, "--reason", "r", "--dry-run")
    refused = ratchet(tmp_path, *words, said="n\n")
    assert refused.exit_code == 1 and "cannot be undone" in refused.output
    assert ledger.deletions() == []
    assert ratchet(tmp_path, *words, said="y\n").exit_code == 0
    row = requested(ledger)
    assert (row.state, row.actor, row.reason) == ("requested", context.person(), "consent withdrawn")
    assert row.selector["source"] == "cam" and datetime.fromisoformat(row.selector["before"]) <= datetime.now(UTC)


def test_every_option_becomes_a_field_and_what_cannot_be_selected_is_named(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete, sure = ("samples", "delete"), ("--reason", "r", "--yes")
    for words, named in ((["--id", "abc"], "`id`"), (["--record", "t"], "`record`"), ([], "everything")):
        with pytest.raises(SelectorError, match=named):
            shown(tmp_path, *delete, *words, *sure)
    for words in (["--reason", "  "], ["--reason", "r" * 1001], ["--reason", "r", "--before", "yesterday"]):
        assert ratchet(tmp_path, *delete, "--source", "cam", *words, "--yes").exit_code == 2
    assert ledger.deletions() == []
    options = {"id": "a" * 64, "source": "s", "domain": "d", "concept": "c", "label": "l", "record": "t:0:1"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    words += ["--key", "user-1", "--before", "2026-01-31"]
    with pytest.raises(UnknownRecord, match="no deletion is requested"):
        shown(tmp_path, *delete, *words, *sure)
    assert ledger.deletions() == []
    monkeypatch.setattr("streams.store.deletion.count_selected", lambda *_: Selected(samples=1, refusals=0))
    shown(tmp_path, *delete, *words, *sure)
    key, before = b"user-1".hex(), "2026-01-31T00:00:00+00:00"
    assert requested(ledger).selector == {**options, "key": key, "before": before}


def test_waiting_returns_with_the_receipt_when_no_file_has_it(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    polled = threading.Event()

    def next_poll(seconds: float) -> None:
        polled.set()
        thread.join(30)

    monkeypatch.setattr(samples, "time", SimpleNamespace(sleep=next_poll))

    def maintain() -> None:
        assert polled.wait(30)
        with closing(Maintainer(settings, ledger)) as maintainer:
            maintainer.run_once()

    thread = threading.Thread(target=maintain)
    thread.start()
    result = ratchet(settings.home, "samples", "delete", "--source", "cam", "--reason", "r", "--yes", "--wait")
    text = " ".join(result.output.replace("│", " ").split())
    assert "done: no file has it" in text and "adapters that learned from it none" in text
    assert "waits for maintenance" in result.stderr and "start `ratchet maintain`" in result.stderr
    assert requested(ledger).state == "done"
