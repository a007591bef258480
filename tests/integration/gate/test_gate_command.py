"""`ratchet gate run` and `ratchet gate report` as functions, over a home with a tiny base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from core.artifacts import Artifacts
from core.errors import AdapterError, GateError
from core.ledger import Ledger
from core.loading import load_settings
from core.settings import Settings
from ops.cli.main import app
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample
from tests.support.tiny import tiny_adapter, tiny_base
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.gate_command import gate_command, pairs_command, report_command

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    folder_dataset(home / "data" / "things", count=60)
    (home / "suites").mkdir()
    (home / "suites" / "things.yaml").write_text("task: retrieval\ndata: ${home}/data/things\nmargin: 0.2\n")
    return load_settings(
        overrides={
            "home": home,
            "base.clip": "tiny",
            "updater.threads": 1,
            "gate.suites": [home / "suites"],
            "gate.min_items": 20,
        },
        environ={},
    )


def _adapter(settings: Settings, seed: int) -> str:
    work = settings.home / f"work-{seed}"
    name = tiny_adapter(tiny_base(settings.home), work, seed, scale=0.02)
    Artifacts(settings.artifacts).put_directory(work, f"adapters/{name}")
    return name


def test_a_candidate_is_judged_by_name_and_by_directory(settings: Settings) -> None:
    name = _adapter(settings, 1)
    verdict, page = gate_command(settings, name)
    assert verdict.candidate == name and verdict.incumbent is None
    assert page.is_file() and name in page.read_text()
    assert [suite.name for suite in verdict.suites] == ["things"]
    again, _ = gate_command(settings, str(settings.home / "work-1"), out=settings.home / "elsewhere")
    assert again.candidate == name
    assert (settings.home / "elsewhere" / "report.json").is_file()


def test_the_verdict_tells_results_by_how_often_the_store_named_a_concept(settings: Settings) -> None:
    rows = [sample(0, n, text=f"a picture of concept {n % 5}") for n in range(60)]
    put(SampleStore(settings.lake), rows, Position(TOPIC, 0, 60))
    verdict, page = gate_command(settings, _adapter(settings, 1))
    tail = verdict.diagnostics.tail
    assert tail is not None and tail.rows == tail.counted == 60
    assert {each.name: each.n for each in tail.suites["things"]} == {"never": 55, "10-99": 5}
    assert "how often a concept was seen" in page.read_text()


def test_pairs_of_a_suite_are_listed_and_mined_once(settings: Settings) -> None:
    tiny_base(settings.home)
    index = settings.home / "data" / "things" / "data.csv"
    index.write_text(re.sub(r"thing number (\d+)", r"kind\1 shape\1", index.read_text()))
    listed = pairs_command(settings, "things")
    assert listed and all(each.first.text != each.second.text for each in listed)
    assert len(list((settings.home / "cache" / "gate" / "pairs").iterdir())) == 1
    assert [each.first.id for each in pairs_command(settings, "things")] == [each.first.id for each in listed]
    with pytest.raises(GateError, match=r"no retrieval suite 'other'.*things"):
        pairs_command(settings, "other")
    arguments = ["--set", f"home={settings.home}", "--set", "base.clip=tiny", "--set",
                 f'gate.suites=["{settings.home / "suites"}"]', "gate", "pairs", "things", "--limit", "2"]  # fmt: skip
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert f"{len(listed)} pairs of things" in shown.output and listed[0].first.text in shown.output
    assert listed[-1].first.text not in shown.output


def test_the_incumbent_is_what_is_live_unless_told(settings: Settings) -> None:
    live, candidate = _adapter(settings, 1), _adapter(settings, 2)
    ledger = Ledger.open(settings.ledger)
    proposal = ledger.propose("release", clip=live, vlm=None, actor="op", reason="first")
    ledger.commit_release(1, clip=live, vlm=None, actor="op", reason="first", proposal_id=proposal.id)
    ledger.close()
    assert gate_command(settings, candidate)[0].incumbent == live
    assert gate_command(settings, candidate, incumbent="base")[0].incumbent is None


def test_an_adapter_that_will_not_load_is_a_verdict_and_a_wrong_name_an_error(settings: Settings) -> None:
    name = _adapter(settings, 1)
    weights = Path(Artifacts(settings.artifacts).fetch(f"adapters/{name}")) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    verdict, page = gate_command(settings, name)
    assert verdict.outcome == "rejected" and verdict.caught_by == ("loads",)
    assert "Rejected" in page.read_text()
    with pytest.raises(AdapterError):
        gate_command(settings, "clip-ffffffffffff")


def test_the_report_of_an_update_is_brought_home(settings: Settings) -> None:
    with pytest.raises(GateError, match="no verdict yet"):
        report_command(settings)
    name = _adapter(settings, 1)
    verdict, page = gate_command(settings, name)
    ledger = Ledger.open(settings.ledger)
    update = ledger.begin_update(
        "update-1", family="clip", recipe={"name": "x"}, seed=0, store_version=1, data_from={}, data_to={},
        incumbent=None,
    )  # fmt: skip
    ledger.register_adapter(name, "clip", "tiny", "a", "b", {})
    ledger.record_verdict(update.id, name, verdict.outcome, f"reports/{update.id}/report.html", verdict.summary())
    ledger.close()
    artifacts = Artifacts(settings.artifacts)
    for file in ("report.json", "report.html"):
        artifacts.write_bytes(f"reports/{update.id}/{file}", (page.parent / file).read_bytes())
    brought = report_command(settings)
    assert brought.read_bytes() == page.read_bytes()
    assert json.loads((brought.parent / "report.json").read_text())["candidate"] == name
    with pytest.raises(GateError, match="nobody"):
        report_command(settings, "nobody")
