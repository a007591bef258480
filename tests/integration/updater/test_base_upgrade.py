"""A new base: the same data is learned again on it, judged across bases, released, and rolled back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.errors import BaseModelError, ConfigError, ReleaseError, TrainingError
from core.ledger import Ledger, UpdateRow
from core.settings import Settings
from ops.cli.main import app
from tests.integration.updater.home import add_samples, changed, commit, judged_as, made_by, make_home, release
from tests.support.tiny import tiny_base
from updater.service.base_upgrade import begin_upgrade, cancel_upgrade, finish_upgrade, plan_upgrade, switch_base
from updater.service.process import only_one
from updater.service.update_loop import UpdaterService


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home with two bases of different dimension; the first is served."""
    made = make_home(tmp_path / "home", **{"gate.min_items": 2})
    tiny_base(made.home, "wide", seed=5, dim=48)
    return made


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return judged_as("passed", monkeypatch)


def fill(settings: Settings) -> None:
    add_samples(settings, 12)
    add_samples(settings, 12, split="fresh_eval", partition=1)


def learn(settings: Settings) -> UpdateRow:
    fill(settings)
    service = UpdaterService(settings)
    update = made_by(service)
    release(service.ledger)
    return update


def ratchet_upgrade(settings: Settings, *words: str, **options: Any) -> Any:
    values = [
        f"home={settings.home}", "base.clip=tiny", f"updater.recipe={settings.home / 'default.yaml'}",
        f'updater.reference=["{settings.home / "data" / "things"}"]', "updater.threads=1",
    ]  # fmt: skip
    flags = [word for value in values for word in ("--set", value)]
    return CliRunner().invoke(app, [*flags, "base", "upgrade", *words], **options)


def test_what_was_learned_is_learned_anew_released_learned_on_from_and_taken_back(
    settings: Settings, judged: dict[str, Any]
) -> None:
    old, new = tiny_base(settings.home), tiny_base(settings.home, "wide")
    first = learn(settings)
    add_samples(settings, 5)  # pending: not learned by the incumbent, so not by the upgrade
    ledger = Ledger.open(settings.ledger)

    plan = plan_upgrade(settings, "wide")
    told = dict(plan.rows())
    assert told["dimension"] == "32 -> 48" and told["to learn again"] == "12 samples"
    assert plan.training.steps > 0 and plan.training.visited == 12
    update, _ = finish_upgrade(settings, begin_upgrade(settings, plan, "ann").id)
    assert (update.state, update.data_from, update.data_to) == ("done", {}, first.data_to)
    assert update.incumbent == first.adapter and update.cost["pending"] == 12
    assert ledger.adapter(str(update.adapter)).base == new.digest
    assert ledger.spent(update.id) == 0, "it has a budget of its own"
    verdict = judged["verdict"]
    assert (verdict.base, verdict.incumbent) == ("wide", first.adapter)
    assert {suite.name for suite in verdict.suites} == {"things", "memory.things", "fresh.things"}
    assert {check.name: check.ok for check in verdict.checks}["parity"]
    assert ledger.pending_proposals() == [], "encoders that run have the old base"

    waiting = UpdaterService(settings).step()
    assert waiting.update is None and "ratchet base switch wide" in waiting.reason
    row = switch_base(settings, "wide", actor="ann", reason="better")
    assert (row.number, row.clip, row.clip_base) == (2, update.adapter, new.digest)
    assert ledger.release(1).clip_base == old.digest
    waiting = UpdaterService(settings).step()
    assert waiting.update is None and "'wide'" in waiting.reason and "'tiny'" in waiting.reason

    second = learn(changed(settings, "base", clip="wide"))
    assert (second.incumbent, second.data_from) == (update.adapter, update.data_to)
    assert ledger.adapter(str(second.adapter)).base == new.digest == ledger.release(3).clip_base

    back = switch_base(settings, "tiny", actor="ann", reason="searches are worse")
    assert (back.number, back.clip, back.clip_base) == (4, first.adapter, old.digest)
    assert ledger.held() is not None, "as after every rollback"
    again = switch_base(settings, "wide", actor="ann", reason="they were not")
    assert (again.number, again.clip) == (5, second.adapter), "the newest of that base"


def test_an_upgrade_with_nothing_released_learns_all_goes_on_when_interrupted_and_can_be_dropped(
    settings: Settings, judged: dict[str, Any]
) -> None:
    fill(settings)
    ledger = Ledger.open(settings.ledger)
    commit(ledger)  # the base alone
    begun = begin_upgrade(settings, plan_upgrade(settings, "wide"), "ann")
    tiny_base(settings.home, "third", seed=9)
    with pytest.raises(TrainingError, match="'wide' is not finished"):
        ratchet_upgrade(settings, "third", catch_exceptions=False)
    with only_one(settings.home):
        told = ratchet_upgrade(settings, "wide")
    assert told.exit_code == 0 and "the updater that runs here does it next" in told.output
    update = made_by(UpdaterService(settings))
    assert (update.id, update.incumbent, update.cost["pending"]) == (begun.id, None, 12)
    assert judged["verdict"].incumbent == "the base tiny"
    assert cancel_upgrade(settings, "wide").state == "abandoned"
    assert ledger.approved_upgrade() is None
    with pytest.raises(ReleaseError, match="no upgrade to the base 'wide' has passed"):
        switch_base(settings, "wide", actor="ann", reason="r")


def test_what_cannot_be_upgraded_is_said_before_anything_is_recorded(settings: Settings) -> None:
    for name, words in (("nothing", "no base 'nothing'; registered CLIPs: tiny, wide"), ("tiny", "one that is live")):
        with pytest.raises(BaseModelError, match=words):
            plan_upgrade(settings, name)
    with pytest.raises(TrainingError, match="no training sample"):
        plan_upgrade(settings, "wide")
    add_samples(settings, 12)
    with pytest.raises(ConfigError, match="is not a budget"):
        plan_upgrade(settings, "wide", -1.0)
    told = ratchet_upgrade(settings, "wide", "--dry-run")
    assert told.exit_code == 0 and "32 -> 48" in told.output and "12 samples" in told.output
    assert Ledger.open(settings.ledger).updates() == []
    with pytest.raises(ReleaseError, match="nothing is released yet"):
        switch_base(settings, "wide", actor="ann", reason="r")
