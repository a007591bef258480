from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import Result

from core.errors import LedgerError, SelectorError
from core.ledger import DeletionRow, Ledger
from core.settings import Settings
from ops.cli import context as ctx
from ops.cli import samples
from streams.store import maintenance
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.command_line import ratchet as run
from tests.support.samples import TOPIC, put, refusal, sample


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings.model_validate({"home": tmp_path, "maintain": {"keep_seconds": 0}, "kafka": {"events_topic": ""}})
    rows = [
        sample(0, 0, source="cam", key=b"user-1"), sample(0, 1, source="cam"), sample(0, 2, source="eye"),
        {**refusal(0, 3), "source": "cam"},
    ]  # fmt: skip
    put(SampleStore(made.lake), rows, Position(TOPIC, 0, 4))
    return made


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    opened = Ledger.open(settings.ledger)
    yield opened
    opened.close()


def ratchet(settings: Settings, *words: str, said: str = "") -> Result:
    return run(settings.home, "samples", *words, said=said)


def requested(ledger: Ledger) -> DeletionRow:
    [row] = ledger.deletions()
    return row


def test_a_dry_run_says_how_much_and_deletes_nothing(settings: Settings, ledger: Ledger) -> None:
    result = ratchet(settings, "delete", "--source", "cam", "--reason", "r", "--dry-run")
    assert "2 samples and 1 refused records are selected" in result.output
    assert ledger.deletions() == []


def test_it_asks_and_no_is_no(settings: Settings, ledger: Ledger) -> None:
    result = ratchet(settings, "delete", "--source", "cam", "--reason", "r", said="n\n")
    assert result.exit_code == 1 and "cannot be undone" in result.output
    assert ledger.deletions() == []
    assert ratchet(settings, "delete", "--source", "cam", "--reason", "consent withdrawn", said="y\n").exit_code == 0
    row = requested(ledger)
    assert (row.state, row.actor, row.reason) == ("requested", ctx.person(), "consent withdrawn")
    assert row.selector["source"] == "cam" and datetime.fromisoformat(row.selector["before"]) <= datetime.now(UTC)


def test_every_option_becomes_a_field(settings: Settings, ledger: Ledger) -> None:
    options = {"id": "a" * 64, "source": "s", "domain": "d", "concept": "c", "label": "l", "record": "t:0:1"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    ratchet(settings, "delete", *words, "--key", "user-1", "--before", "2026-01-31", "--reason", "r", "--yes")
    assert requested(ledger).selector == {
        **options, "key": b"user-1".hex(), "before": "2026-01-31T00:00:00+00:00",
    }  # fmt: skip


@pytest.mark.parametrize(("key", "selected"), [("user-1", 1), ("0x757365722D31", 1), ("user-2", 0)])
def test_a_key_is_text_or_hex(settings: Settings, key: str, selected: int) -> None:
    output = ratchet(settings, "delete", "--key", key, "--reason", "r", "--dry-run").output
    assert f"{selected} samples" in output


def test_what_cannot_be_selected_is_named_and_nothing_is_requested(settings: Settings, ledger: Ledger) -> None:
    for words, named in ((["--id", "abc"], "`id`"), (["--record", "t"], "`record`"), ([], "everything")):
        with pytest.raises(SelectorError, match=named):
            ratchet(settings, "delete", *words, "--reason", "r", "--yes")
    for words in (["--reason", "  "], ["--reason", "r" * 1001], ["--reason", "r", "--before", "yesterday"]):
        assert ratchet(settings, "delete", "--source", "cam", *words, "--yes").exit_code == 2
    assert ledger.deletions() == []


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
        maintainer = Maintainer(settings, ledger)
        maintainer.run_once()
        maintainer.close()

    thread = threading.Thread(target=maintain)
    thread.start()
    result = ratchet(settings, "delete", "--source", "cam", "--reason", "r", "--yes", "--wait")
    shown = " ".join(result.output.replace("│", " ").split())
    assert "done: no file has it" in shown and "adapters that learned from it none" in shown
    assert "waits for maintenance" in result.stderr and "start `ratchet maintain`" in result.stderr
    assert requested(ledger).state == "done"


def test_deletions_are_listed_and_a_receipt_names_adapters_and_times(settings: Settings, ledger: Ledger) -> None:
    ledger.request_deletion("d1", {"source": "\x1b[31mcam [bold]"}, actor="ann", reason="asked to")
    adapters = {"learned": ["clip-a"], "may_have_replayed": ["clip-b"]}
    ledger.deletion_removed("d1", samples=2, refusals=1, adapters=adapters, store_version=3)
    ledger.list_deletions_in("update-7", 3)
    ledger.request_deletion("d2", {"domain": "x"}, actor="bob", reason="r")
    listed = ratchet(settings, "deletions").output
    assert "d1" in listed and "d2" in listed and "[bold]" in listed and "\x1b" not in listed
    shown = ratchet(settings, "deletions", "d1").output
    for told in ("removed: no reader finds it", "clip-a", "clip-b", "update-7", "asked to", "not yet"):
        assert told in shown
    receipt: dict[str, Any] = json.loads(ratchet(settings, "deletions", "d1", "--json").output)
    assert (receipt["samples"], receipt["refusals"], receipt["adapters"]) == (2, 1, adapters)
    assert receipt["first_update_without"] == "update-7" and receipt["done_at"] is None
    assert [each["id"] for each in json.loads(ratchet(settings, "deletions", "--json").output)] == ["d2", "d1"]
    with pytest.raises(LedgerError, match="no deletion"):
        ratchet(settings, "deletions", "d3")
