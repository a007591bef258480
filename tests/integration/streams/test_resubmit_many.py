"""Quarantined records are resubmitted in bulk: each once, by filter, and failures may be tried again."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.errors import BrokerError, ConfigError
from core.ledger import Ledger
from core.settings import Settings
from ops.cli.main import app
from streams.ingest import resubmit as module
from streams.ingest.resubmit import HEADER, QuarantineFilter, ResubmitReport, resubmit_many
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, read_topic

pytestmark = pytest.mark.integration
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
REASONS = ["schema", "schema", "uri_unreachable", "uri_unreachable", "schema", "empty"]


def quarantined(offset: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "quarantine", "topic": "t", "partition": 0, "offset": offset, "reason": reason, "detail": "",
        "source": f"cam {offset % 2}", "ingested_at": WHEN + timedelta(hours=offset), "original_key": b"k",
        "original": None if reason == "empty" else b"value %d" % offset,
        "original_headers": json.dumps([["x", "eQ=="], [HEADER, "dDow"]]),
    }  # fmt: skip


def quarantine(settings: Settings) -> Settings:
    rows = [quarantined(offset, reason) for offset, reason in enumerate(REASONS)]
    SampleStore(settings.lake).put(rows, [Position("t", 0, len(rows))])
    return settings


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    found = broker.settings(tmp_path)
    make_topics(found)
    return quarantine(found)


@pytest.fixture(scope="module")
def without_broker(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return quarantine(Settings(home=tmp_path_factory.mktemp("home"), kafka={"bootstrap": "127.0.0.1:1"}))


def again(settings: Settings, ledger: Ledger, which: QuarantineFilter, **options: Any) -> ResubmitReport:
    return resubmit_many(settings, ledger, which, actor="ann", reason="corrected", per_second=10_000, **options)


def values(settings: Settings, at_least: int) -> list[bytes]:
    return sorted(record.value for record in read_topic(settings.kafka, settings.kafka.topic, at_least))


def test_each_is_sent_once_as_it_came_with_its_position(settings: Settings, ledger: Ledger) -> None:
    progress: list[int] = []
    report = again(
        settings, ledger, QuarantineFilter("schema"), on_progress=lambda so_far: progress.append(so_far.sent)
    )
    assert (report.chosen, report.sent, report.before, report.exit_status) == (3, 3, 0, 0)
    assert progress == [1, 2, 3]
    report = again(settings, ledger, QuarantineFilter("schema"))
    assert (report.chosen, report.sent, report.before, report.exit_status) == (0, 0, 3, 0)
    records = read_topic(settings.kafka, settings.kafka.topic, 3)
    assert sorted(each.value for each in records) == [b"value 0", b"value 1", b"value 4"]
    assert {each.key for each in records} == {b"k"}
    assert sorted(dict(each.headers)[HEADER] for each in records) == [b"t:0:0", b"t:0:1", b"t:0:4"]
    assert [(row.actor, row.action) for row in ledger.audit_rows()] == [("ann", "resubmit")] * 3


def test_the_oldest_that_were_not_sent_are_chosen_first(settings: Settings, ledger: Ledger) -> None:
    for expected in (2, 2, 1):
        report = again(settings, ledger, QuarantineFilter(limit=2))
        assert report.sent == expected
    assert (report.empty, report.exit_status) == (1, 3)  # a record without a value cannot be sent
    assert len(values(settings, 5)) == 5


@pytest.mark.parametrize(
    ("which", "count"),
    [
        (QuarantineFilter(), 6), (QuarantineFilter("uri_unreachable"), 2), (QuarantineFilter(source="cam 1"), 3),
        (QuarantineFilter("schema", "cam 0"), 2), (QuarantineFilter(since=WHEN + timedelta(hours=4)), 2),
        (QuarantineFilter(source=""), 0), (QuarantineFilter(limit=4), 4),
    ],
)  # fmt: skip
def test_a_dry_run_counts_and_sends_nothing(without_broker: Settings, which: QuarantineFilter, count: int) -> None:
    with closing(Ledger.open(without_broker.ledger)) as ledger:
        report = again(without_broker, ledger, which, dry_run=True)
        assert (report.chosen, report.sent, str(count) in str(report)) == (count, 0, True)
        assert ledger.audit_rows() == []


def test_of_two_calls_at_once_one_sends_each(settings: Settings, ledger: Ledger) -> None:
    def other(report: ResubmitReport) -> None:
        if report.sent == 1:
            nested.append(again(settings, ledger, QuarantineFilter("schema")))

    nested: list[ResubmitReport] = []
    report = again(settings, ledger, QuarantineFilter("schema"), on_progress=other)
    assert (nested[0].sent, nested[0].before) == (2, 1)
    assert (report.sent, report.before, report.chosen) == (1, 2, 1)
    assert len(values(settings, 3)) == 3


def test_a_broker_that_is_gone_ends_it_and_what_failed_may_be_tried_again(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __init__(self, *_: object) -> None: ...

        def send(self, *_: object) -> Any:
            raise BrokerError("the broker refuses it.")

        def close(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(module, "RecordSender", Refusing)
        with pytest.raises(BrokerError, match="ended early: 0 of 5 records were sent again; 3 failed"):
            again(settings, ledger, QuarantineFilter(limit=5))
    report = again(settings, ledger, QuarantineFilter(limit=5))
    assert (report.sent, report.before) == (5, 0)


def test_a_filter_is_checked() -> None:
    for wrong in ({"reason": "nonsense"}, {"limit": 0}, {"limit": 10**9}):
        with pytest.raises(ConfigError):
            QuarantineFilter(**wrong)


def test_the_command_tells_by_its_exit_status(settings: Settings) -> None:
    words = ["--set", f"home={settings.home}", "--set", f"kafka.bootstrap={settings.kafka.bootstrap}",
             "--set", f"kafka.topic={settings.kafka.topic}",
             "quarantine", "resubmit", "--reason", "corrected"]  # fmt: skip
    run = CliRunner().invoke
    shown = run(app, [*words, "--refused-for", "schema", "--dry-run"])
    assert (shown.exit_code, "3 records would be sent again" in shown.output) == (0, True)
    assert run(app, words).exit_code == 2  # no filter
    sent = run(app, [*words, "--all", "--per-second", "1000"])
    assert (sent.exit_code, "5 of 6 records were sent again; 1 have no value" in sent.output) == (3, True)
    assert run(app, [*words, "--refused-for", "schema"]).exit_code == 0
