"""Each trigger begins an update when what it watches for has really happened, over a real ledger and store."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from core.errors import ConfigError
from core.ledger import UpdateRow
from core.ledger.rows import FeedbackRow, utc_now
from core.loading import load_settings
from ops.cli.status import screen
from streams.store.sample_store import SampleStore
from tests.integration.updater.home import add_samples
from tests.unit.updater.service.test_triggers import Lab
from updater.service import drift, trigger_checks
from updater.service.drift import ALPHA, FIRST_LOOK, distance_test, look_at
from updater.service.triggers import BY_OPERATOR

NIGHTLY = "0 3 * * *"


class TriggerLab(Lab):
    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.set("updater", wait_for_items=False, max_wait_seconds=1e6)

    def waits(self) -> str:
        """Why no update begins, without how long the oldest sample has been waiting."""
        return re.sub(r"(?<=sample waiting for )[\d,]+", "…", super().waits())

    def listed(self, *triggers: str, **values: Any) -> None:
        self.set("updater", triggers=list(triggers), **values)

    def add_of(self, count: int, **columns: Any) -> None:
        add_samples(self.settings, count, words=lambda offset: columns)

    def learned_all(self, name: str = "u1", began: datetime | None = None, **cost: Any) -> None:
        """An update of the recipe that has tried all samples, and began then."""
        self.ledger.begin_update(
            name, family="clip", recipe=self.recipe.model_dump(mode="json"), seed=0, store_version=self.store.version(),
            data_from={}, data_to=self.store.offsets(), incumbent=None, cost=cost or {"trigger": "samples: 1 new"},
        )  # fmt: skip
        self.ledger.advance_update(name, "failed", error="e")
        if began is not None:
            with self.ledger.database.write() as session:
                session.get_one(UpdateRow, name).created_at = began

    def report(self, wrong: int, of: int, caller: str, days: float = 0) -> None:
        for number in range(of):
            name = f"{caller}-{number}-{days}"
            self.ledger.record_feedback(FeedbackRow(
                id=f"{name:0>64}", caller=caller, release=1, route="classify", input="0" * 32, answered_at=utc_now(),
                verdict="wrong" if number < wrong else "right", detail={}, created_at=utc_now() - timedelta(days=days),
            ))  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[TriggerLab]:
    made = TriggerLab(tmp_path)
    yield made
    made.ledger.close()


def test_by_default_enough_samples_or_one_that_has_waited_for_long_begin_an_update(lab: TriggerLab) -> None:
    lab.add(9)
    assert lab.settings.updater.triggers == ["samples", "age"]
    assert lab.waits() == "9 of 10 new samples; the oldest sample waiting for … of 1,000,000 s"
    assert lab.begins(now=True).trigger == lab.begins(retry=True).trigger == BY_OPERATOR
    lab.waited_for_long()
    assert lab.begins().trigger.startswith("age: the oldest sample waiting for ")
    lab.add(1)
    assert lab.begins().trigger == "samples: 10 new"


def test_a_trigger_that_is_not_listed_begins_nothing(lab: TriggerLab) -> None:
    lab.listed("age")
    lab.add(12)
    assert lab.waits() == "the oldest sample waiting for … of 1,000,000 s"
    lab.listed("samples")
    lab.waited_for_long()
    assert lab.begins()
    lab.set("updater", min_new_samples=20)
    assert lab.waits() == "12 of 20 new samples"


def test_any_trigger_waits_for_the_fresh_items_but_not_for_ever(lab: TriggerLab) -> None:
    lab.listed("samples", wait_for_items=True)
    lab.add(12)
    lab.add(3, fresh=True)
    assert lab.waits().startswith("3 of 16 fresh items, the oldest sample waiting for")
    lab.waited_for_long()
    assert lab.begins().trigger == "samples: 12 new"


def test_cron_is_due_once_after_the_last_update_and_needs_a_new_sample(lab: TriggerLab) -> None:
    lab.listed("cron", cron=NIGHTLY)
    lab.learned_all(began=utc_now() - timedelta(days=2))
    assert lab.waits() == "there are no new samples"
    lab.add(1)
    due = (utc_now() - timedelta(days=2)).replace(hour=3, minute=0)
    trigger = lab.begins().trigger
    assert trigger in [f"cron: `{NIGHTLY}` was due at {due + timedelta(days=d):%Y-%m-%d %H:%M} UTC" for d in (0, 1)]
    lab.learned_all("u2", began=utc_now())
    lab.add(1)
    assert lab.waits().startswith(f"`{NIGHTLY}` is due at ")
    lab.learned_all("u1-look-2", began=utc_now() - timedelta(days=2), trigger="t", trained_by="u1")
    lab.add(1)
    assert lab.waits(), "a further look is not an update"


def test_before_the_first_update_cron_is_due_after_the_oldest_sample(lab: TriggerLab) -> None:
    lab.listed("cron", cron=NIGHTLY)
    lab.add(1)
    assert lab.waits().startswith(f"`{NIGHTLY}` is due at ")
    lab.add_of(1, ingested_at=datetime.now(UTC) - timedelta(days=2))
    assert lab.begins().trigger.startswith("cron: ")


def test_more_wrong_answers_than_before_begin_one_update(lab: TriggerLab) -> None:
    lab.listed("wrong_rate")
    lab.add(1)
    assert lab.waits() == "no reported answers: no release is live"
    lab.ledger.commit_release(1, clip=None, vlm=None, actor="u", reason="r", proposal_id=None)
    lab.report(2, 50, "a", days=20)
    lab.report(1, 20, "a", days=1)
    assert "1 of 20 answers of release 1 reported as wrong since " in lab.waits()
    lab.report(19, 20, "a")
    trigger = lab.begins().trigger
    assert trigger.startswith("wrong_rate: 20 of 40 answers of release 1 reported as wrong since ")
    assert trigger.endswith(", 2 of 50 before")
    lab.learned_all()
    lab.add(1)
    assert "0 of 0 answers of release 1" in lab.waits(), "an update was begun for these"


def test_one_loud_caller_of_several_begins_nothing(lab: TriggerLab) -> None:
    lab.listed("wrong_rate")
    lab.add(1)
    lab.ledger.commit_release(1, clip=None, vlm=None, actor="u", reason="r", proposal_id=None)
    lab.report(2, 50, "a", days=20)
    for caller in "abcd":
        lab.report(0, 5, caller)
    lab.report(60, 60, "hostile")
    assert "0 of 20 answers" in lab.waits()


def test_drift_begins_an_update_when_another_domain_or_label_comes(lab: TriggerLab) -> None:
    lab.listed("drift")
    lab.add_of(3 * FIRST_LOOK, domain="birds")
    assert lab.begins().trigger == "drift: nothing of the stream was learned before"
    lab.learned_all()
    lab.add_of(FIRST_LOOK - 1, domain="birds")
    assert lab.waits() == "63 of 64 new samples to look for drift"
    lab.add_of(1, domain="birds")
    assert lab.waits() == "domain of 64 new samples is 0.00 from that of 64 earlier ones (p 1)"
    lab.add_of(FIRST_LOOK, domain="fish")
    assert lab.begins().trigger.startswith("drift: domain of 128 new samples is 0.50 from that of 128 earlier ones (p ")
    lab.learned_all("u2")
    lab.add_of(FIRST_LOOK, domain="fish")
    assert lab.waits(), "it has gone on as it was"
    lab.learned_all("u3")
    lab.add_of(FIRST_LOOK, domain="fish", label="trout")
    assert lab.begins().trigger.startswith("drift: label of 64")


def test_drift_reads_the_store_once_for_each_doubling(lab: TriggerLab, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[dict[str, Any]] = []
    scan = SampleStore.scan
    monkeypatch.setattr(SampleStore, "scan", lambda store, **how: reads.append(how) or scan(store, **how))  # type: ignore[func-returns-value]
    lab.listed("drift")
    lab.add(FIRST_LOOK)
    lab.learned_all()
    for _ in range(3):
        lab.add(FIRST_LOOK)
        assert lab.waits()
    assert len(reads) == 2


def test_samples_before_that_are_too_few_show_no_drift(lab: TriggerLab) -> None:
    lab.listed("drift")
    lab.add(3)
    lab.learned_all()
    lab.add_of(FIRST_LOOK, domain="fish")
    assert lab.waits() == "no drift can be shown: there are 3 earlier samples to compare with"


def test_without_drift_the_looks_of_an_update_hardly_ever_find_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "PERMUTATIONS", 2000)
    random, alarms, streams = np.random.default_rng(0), 0, 100
    for _ in range(streams):
        values = [str(value) for value in random.choice(5, 512, p=[0.6, 0.2, 0.1, 0.05, 0.05])]
        chances = [distance_test(values[256 - size : 256], values[256 : 256 + size])[2] for size in (64, 128, 256)]
        alarms += any(chance <= ALPHA / (look * (look + 1)) for look, chance in enumerate(chances, start=1))
    assert alarms <= ALPHA * streams + 2 * (ALPHA * streams) ** 0.5


def test_the_distance_is_that_of_the_shares_and_rare_values_count_as_one() -> None:
    distance, excess, chance = distance_test(["a"] * 60 + ["b"] * 40, ["a"] * 20 + ["b"] * 80)
    assert distance == pytest.approx(0.4) and 0.3 < excess < distance and chance < 1e-3
    distance, excess, chance = distance_test([f"a{n}" for n in range(300)], [f"b{n}" for n in range(300)])
    assert excess < 0.1, "names that never come again are no change"
    assert [look_at(count) for count in (0, 63, 64, 127, 128, 5000)] == [0, 0, 64, 64, 128, 4096]


def test_the_status_shows_what_began_an_update(lab: TriggerLab) -> None:
    lab.learned_all(trigger="samples: 512 new")
    console = Console(width=200, record=True, file=StringIO())
    console.print(screen(lab.settings))
    assert "samples: 512 new" in console.export_text()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"updater.triggers": []}, r"updater\.triggers = \[\].*at least 1 item"),
        ({"updater.triggers": ["sometimes"]}, r"updater\.triggers\.0 = 'sometimes'.*'samples', 'age'"),
        ({"updater.triggers": ["cron"]}, r"updater\.cron = ''.*`0 3 \* \* \*`"),
        ({"updater.triggers": ["cron"], "updater.cron": "at night"}, r"updater\.cron = 'at night'.*five fields"),
        ({"updater.cron": "0 0 30 2 *"}, r"updater\.cron = .*Bad day-of-month"),
    ],
)
def test_triggers_that_cannot_hold_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_settings(overrides=values, environ={})


def test_triggers_are_read_from_the_environment() -> None:
    environ = {"RATCHET_UPDATER__TRIGGERS": "[samples, cron]", "RATCHET_UPDATER__CRON": "*/5 * * * *"}
    updater = load_settings(environ=environ).updater
    assert (updater.triggers, updater.cron) == (["samples", "cron"], "*/5 * * * *")
    assert set(trigger_checks.CHECKS) == {"samples", "age", "drift", "wrong_rate", "cron"}
