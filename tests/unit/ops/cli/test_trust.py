"""Held samples and distrusted sources on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.errors import ConfigError, GateError, LedgerError, RecordError, StoreUnavailable, UnknownRecord
from core.ledger import Ledger
from core.settings import Settings
from ops import held_samples
from ops.cli.config import settings_yaml
from ops.cli.main import app
from ops.cli.trust import LIMIT
from streams.store.rows import SPLITS, Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.command_line import ratchet
from tests.support.inputs import pictures
from tests.support.samples import TOPIC, sample

NASTY = "o'brien <script> [bold]x[/bold] \x1b[31m"
WHY = ("--reason", "looked at them")


def held(number: int, reason: str = "held_agreement", split: str = "held_train", **fields: Any) -> dict[str, Any]:
    known = {"source": "shop", "domain": "streets", "reason": reason, "detail": f"detail {number}"}
    return sample(0, number, split=split, **known | fields)


ROWS = [
    held(0), held(1, image=pictures(1)[0]), held(2, "held_quota", source=NASTY, text=NASTY),
    held(3, "held_source", "held_fresh_eval", source=None, domain=None), sample(0, 4, source="shop"),
    sample(0, 5, source="vendor", split="fresh_eval"),
]  # fmt: skip
IDS = [row["id"] for row in ROWS]


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    store = SampleStore(Settings(home=tmp_path).lake)
    store.put(ROWS, [Position(TOPIC, 0, len(ROWS))])
    return store


@pytest.fixture
def ledger(tmp_path: Path, store: SampleStore) -> Iterator[Ledger]:
    with closing(Ledger.open(Settings(home=tmp_path).ledger)) as ledger:
        yield ledger


def trust(home: Path, *words: str) -> str:
    return ratchet(home, "trust", *words).output


def as_json(home: Path, *words: str) -> Any:
    return json.loads(trust(home, *words, "--json"))


def test_held_samples_are_counted_by_source_and_reason_and_distrusted_sources_named(
    tmp_path: Path, ledger: Ledger
) -> None:
    ledger.distrust("vendor", actor="updater", reason="update passed without it", update_id="update-1")
    found = as_json(tmp_path, "list")
    assert [(row["source"], row["reason"], row["samples"]) for row in found["held"]] == [
        ("shop", "held_agreement", 2), ("", "held_source", 1), (NASTY, "held_quota", 1),
    ]  # fmt: skip
    (row,) = found["distrusted"]
    assert row.pop("created_at") and row == {
        "source": "vendor", "actor": "updater", "reason": "update passed without it", "update_id": "update-1",
    }  # fmt: skip
    shown = trust(tmp_path, "list")
    assert "vendor" in shown and "update-1" in shown and "[bold]x[/bold]" in shown and "\x1b" not in shown
    assert "(none)" in shown


def test_nothing_held_and_nobody_distrusted_is_said(tmp_path: Path) -> None:
    Ledger.open(Settings(home=tmp_path).ledger).close()
    shown = trust(tmp_path, "list")
    assert "Distrusted sources: none" in shown and "Held samples: none" in shown
    assert as_json(tmp_path, "list") == {"distrusted": [], "held": []}
    assert as_json(tmp_path, "samples") == []
    assert "no sample is held" in trust(tmp_path, "accept", "--source", "shop", *WHY)


def test_held_samples_are_listed_with_their_reasons_and_images(tmp_path: Path, ledger: Ledger) -> None:
    assert [row["id"] for row in as_json(tmp_path, "samples")] == IDS[3::-1]
    assert [row["id"] for row in as_json(tmp_path, "samples", "--limit", "1", "--source", "shop")] == [IDS[1]]
    (row,) = as_json(tmp_path, "samples", "--source", NASTY, "--held-for", "held_quota")
    assert (row["text"], row["detail"], row["split"]) == (NASTY, "detail 2", "held_train")
    assert [row["id"] for row in as_json(tmp_path, "samples", "--source", "")] == [IDS[3]]
    shown = trust(tmp_path, "samples", "--out", str(tmp_path / "new" / "images"), "--held-for", "held_agreement")
    assert IDS[0][:12] in shown and "detail 0" in shown
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "images").iterdir()}
    assert written == {f"{IDS[0][:12]}.bin": ROWS[0]["image"], f"{IDS[1][:12]}.png": ROWS[1]["image"]}
    shown = trust(tmp_path, "samples", "--source", NASTY)
    assert "[bold]x[/bold]" in shown and "\x1b" not in shown
    with pytest.raises(ConfigError, match="held for 'quota'") as wrong:
        trust(tmp_path, "samples", "--held-for", "quota")
    assert "held_quota" in wrong.value.fix
    (tmp_path / "file").write_text("")
    assert ratchet(tmp_path, "trust", "samples", "--out", str(tmp_path / "file")).exit_code == 2


def test_samples_are_accepted_by_id_and_it_is_recorded(tmp_path: Path, store: SampleStore, ledger: Ledger) -> None:
    assert "2 samples are accepted" in trust(tmp_path, "accept", IDS[0][:8], IDS[3], IDS[0], *WHY)
    tally = store.tally()
    assert [tally[split] for split in SPLITS] == [2, 2, 2, 0]
    (noted,) = ledger.audit_rows(1)
    assert (noted.action, noted.subject) == ("accept samples", "samples")
    assert noted.detail == {"reason": "looked at them", "samples": 2, "ids": [IDS[0][:12], IDS[3][:12]]}
    trust(tmp_path, "accept", IDS[2], *WHY)
    assert ledger.audit_rows(1)[0].subject == f"sample {IDS[2]}"
    with pytest.raises(UnknownRecord, match="no held sample") as unknown:
        trust(tmp_path, "accept", IDS[1], IDS[0], *WHY)
    assert "ratchet trust samples" in unknown.value.fix and store.tally()["held_train"] == 1
    for wrong in ("no id", "0' OR '1'='1", ""):
        with pytest.raises(RecordError):
            trust(tmp_path, "accept", wrong, *WHY)


def test_a_beginning_that_several_ids_share_is_refused(tmp_path: Path, store: SampleStore, ledger: Ledger) -> None:
    store.put([held(n, topic="more", id=f"{'a' * 8}{n:056x}") for n in range(2)], [Position("more", 0, 2)])
    with pytest.raises(RecordError, match="several"):
        trust(tmp_path, "accept", "a" * 8, *WHY)
    assert store.tally()["held_train"] == 5


def test_samples_of_a_source_are_accepted_by_reason_and_up_to_a_bound(
    tmp_path: Path, store: SampleStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no sample is held" in trust(tmp_path, "accept", "--source", "shop", "--held-for", "held_source", *WHY)
    monkeypatch.setattr(held_samples, "MOST", 1)
    shown = trust(tmp_path, "accept", "--source", "shop", "--held-for", "held_agreement", *WHY)
    assert "1 sample is accepted" in shown and "1 more" in shown and "again" in shown
    shown = trust(tmp_path, "accept", "--source", "shop", *WHY)
    assert "1 sample is accepted" in shown and "more" not in shown
    assert "1 sample is accepted" in trust(tmp_path, "accept", "--source", NASTY, *WHY)
    assert "1 sample is accepted" in trust(tmp_path, "accept", "--source", "", *WHY)
    assert [store.tally()[split] for split in SPLITS] == [4, 2, 0, 0]
    noted = [(row.subject, row.detail.get("held_for")) for row in ledger.audit_rows(10)][::-1]
    assert noted == [
        ("source shop", "held_agreement"),
        ("source shop", None),
        (f"source {NASTY}", None),
        ("source", None),
    ]


@pytest.mark.parametrize("words", [(), (IDS[0], "--source", "shop"), (IDS[0], "--held-for", "held_quota")])
def test_either_ids_or_a_source_are_accepted(tmp_path: Path, ledger: Ledger, words: tuple[str, ...]) -> None:
    result = ratchet(tmp_path, "trust", "accept", *words, *WHY)
    assert result.exit_code == 2 and "--source" in result.output
    assert "--reason is required" in ratchet(tmp_path, "trust", "accept", IDS[0]).output
    assert ledger.audit_rows() == []


def test_what_cannot_be_recorded_is_not_accepted(
    tmp_path: Path, store: SampleStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> int:
        raise LedgerError("the ledger is away.", "Start it.")

    monkeypatch.setattr(Ledger, "audit", away)
    with pytest.raises(LedgerError):
        trust(tmp_path, "accept", IDS[0], *WHY)
    assert store.tally()["held_train"] == 3


def test_an_outage_of_the_store_says_so_and_the_rest_is_accepted_later(
    tmp_path: Path, store: SampleStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> int:
        raise StoreUnavailable("the store is away.", "Try again.")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "accept", away)
        with pytest.raises(StoreUnavailable):
            trust(tmp_path, "accept", "--source", "shop", *WHY)
    assert "2 samples are accepted" in trust(tmp_path, "accept", "--source", "shop", *WHY)


def test_a_source_is_distrusted_and_trusted_again(tmp_path: Path, store: SampleStore, ledger: Ledger) -> None:
    shown = trust(tmp_path, "distrust", "shop", "--reason", "swapped captions")
    assert "3 stored samples" in shown and "'shop'" in shown
    (row,) = ledger.distrusted()
    assert (row.source, row.reason, row.update_id) == ("shop", "swapped captions", None)
    again = trust(tmp_path, "distrust", "shop", "--reason", "once more")
    assert "already" in again and "swapped captions" in again
    assert "no stored sample" in trust(tmp_path, "distrust", "shpo", "--reason", "a typing error")
    assert "learned from again" in trust(tmp_path, "trust", "shop", "--reason", "they repaired it")
    assert [each.source for each in ledger.distrusted()] == ["shpo"]
    with pytest.raises(LedgerError, match="is trusted") as trusted:
        trust(tmp_path, "trust", "shop", "--reason", "x")
    assert "ratchet trust list" in trusted.value.fix
    for wrong in ("", " ", "x" * 257):
        with pytest.raises(ConfigError, match="source"):
            trust(tmp_path, "distrust", wrong, "--reason", "x")
    assert [row.action for row in ledger.audit_rows(10)] == ["trust", "distrust", "distrust"]


def test_each_command_has_an_example_and_the_limit_holds(tmp_path: Path) -> None:
    (group,) = (each for each in app.registered_groups if each.name == "trust")
    assert group.typer_instance is not None
    for command in group.typer_instance.registered_commands:
        assert command.callback is not None and "Example" in (command.callback.__doc__ or "")
    assert ratchet(tmp_path, "trust", "samples", "--limit", str(LIMIT + 1)).exit_code == 2


def test_held_samples_are_listed_by_split_and_counted(tmp_path: Path, store: SampleStore, ledger: Ledger) -> None:
    listed = json.loads(ratchet(tmp_path, "samples", "list", "--split", "held_train", "--json").output)
    assert [row["id"] for row in listed] == IDS[2::-1]
    for split in SPLITS:
        assert ratchet(tmp_path, "samples", "list", "--split", split).exit_code == 0
    stats = json.loads(ratchet(tmp_path, "samples", "stats", "--json").output)
    assert [stats[name] for name in SPLITS] == [1, 1, 3, 1] and stats["sample"] == 6
    traced = ratchet(tmp_path, "samples", "trace", f"{TOPIC}:0:2").output
    for words in ("held", "reason: held_quota", "detail: detail 2", "split: held_train"):
        assert words in traced


def test_rules_are_shown_and_written_as_they_are_set(tmp_path: Path) -> None:
    rules = '{"new:*": {"hold": true}}'
    shown = ratchet(tmp_path, "--set", f"trust.sources={rules}", "config", "show", "--json").output
    assert json.loads(shown)["trust.sources"]["value"] == str({"new:*": {"share": 1.0, "per_day": 0, "hold": True}})
    assert yaml.safe_load(settings_yaml({"trust.sources": json.loads(rules)}))["trust"]["sources"] == json.loads(rules)
    assert "feedback:*" in settings_yaml({})


def test_gate_blame_ranks_the_sources_of_a_rejected_update_and_names_what_became_of_the_next(
    tmp_path: Path, ledger: Ledger
) -> None:
    suspects = [{"source": NASTY, "samples": 9, "harm": 0.1321987}, {"source": "shop", "samples": 40, "harm": -0.2}]
    for name, cost in (("update-1", {}), ("update-2", {"trigger": "blame: update-1 failed with x"})):
        ledger.begin_update(
            name, family="clip", recipe={"name": "default"}, seed=0, store_version=1, data_from={}, data_to={},
            incumbent=None, cost=cost,
        )  # fmt: skip
    for name in ("update-1", "update-9"):
        with pytest.raises(GateError, match="has no ranking of sources"):
            ratchet(tmp_path, "gate", "blame", name)
    found = {"items": 12, "source": NASTY, "suspects": suspects}
    ledger.record_verdict("update-1", "clip-1", "rejected", "reports/update-1", {"blame": found})
    said = " ".join(ratchet(tmp_path, "gate", "blame", "update-1").output.split())
    assert "12 items got worse" in said and "is blamed" in said and "13.2%" in said and "\x1b[31m" not in said
    assert "update-2 repeats it without the source: training" in said
    assert json.loads(ratchet(tmp_path, "gate", "blame", "update-1", "--json").output) == found
