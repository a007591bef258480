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

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home with two bases of different dimension; the first is served."""
    made = make_home(tmp_path / "home", **{"gate.min_items": 2})
    tiny_base(made.home, "wide", seed=5, dim=48)
    return made


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return judged_as("passed", monkeypatch)


def learn(settings: Settings, fresh: int = 12) -> UpdateRow:
    add_samples(settings, 12)
    add_samples(settings, fresh, split="fresh_eval", partition=1)
    service = UpdaterService(settings)
    update = made_by(service)
    release(service.ledger)
    return update


def upgraded(settings: Settings, name: str = "wide", gflops: float | None = None) -> UpdateRow:
    update = begin_upgrade(settings, plan_upgrade(settings, name, gflops), "ann")
    return finish_upgrade(settings, update.id)[0]


def on(settings: Settings, base: str) -> Settings:
    return changed(settings, "base", clip=base)


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
    update = upgraded(settings)
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

    second = learn(on(settings, "wide"))
    assert (second.incumbent, second.data_from) == (update.adapter, update.data_to)
    assert ledger.adapter(str(second.adapter)).base == new.digest == ledger.release(3).clip_base

    back = switch_base(settings, "tiny", actor="ann", reason="searches are worse")
    assert (back.number, back.clip, back.clip_base) == (4, first.adapter, old.digest)
    assert ledger.held() is not None, "as after every rollback"
    again = switch_base(settings, "wide", actor="ann", reason="they were not")
    assert (again.number, again.clip) == (5, second.adapter), "the newest of that base"


def test_without_a_release_the_old_base_alone_is_the_incumbent_and_all_that_is_stored_is_learned(
    settings: Settings, judged: dict[str, Any]
) -> None:
    add_samples(settings, 12)
    add_samples(settings, 12, split="fresh_eval", partition=1)
    ledger = Ledger.open(settings.ledger)
    commit(ledger)
    update = upgraded(settings)
    assert update.cost["pending"] == 12 and update.incumbent is None
    assert judged["verdict"].incumbent == "the base tiny"
    row = switch_base(settings, "wide", actor="ann", reason="better")
    assert (row.clip, ledger.release(1).clip_base) == (update.adapter, tiny_base(settings.home).digest)


def test_an_upgrade_that_was_interrupted_goes_on_and_one_that_waits_can_be_dropped(settings: Settings) -> None:
    learn(settings)
    update = begin_upgrade(settings, plan_upgrade(settings, "wide"), "ann")
    tiny_base(settings.home, "third", seed=9)
    with pytest.raises(TrainingError, match="'wide' is not finished"):
        CliRunner().invoke(app, _flags(settings, "third"), catch_exceptions=False)
    with only_one(settings.home):
        told = CliRunner().invoke(app, _flags(settings, "wide"))
    assert told.exit_code == 0 and "the updater that runs here does it next" in told.output
    done = UpdaterService(settings).step().update
    assert done is not None and (done.id, done.state) == (update.id, "done")
    assert cancel_upgrade(settings, "wide").state == "abandoned"
    assert Ledger.open(settings.ledger).approved_upgrade() is None
    with pytest.raises(ReleaseError, match="no upgrade to the base 'wide' has passed"):
        switch_base(settings, "wide", actor="ann", reason="r")


def test_what_cannot_be_upgraded_is_said_before_anything_is_recorded(settings: Settings) -> None:
    wide = tiny_base(settings.home, "wide")
    with pytest.raises(BaseModelError, match="no base 'nothing'; registered CLIPs: tiny, wide"):
        plan_upgrade(settings, "nothing")
    with pytest.raises(BaseModelError, match="'tiny' is the one that is live"):
        plan_upgrade(settings, "tiny")
    with pytest.raises(TrainingError, match="no training sample"):
        plan_upgrade(settings, "wide")
    add_samples(settings, 12)
    with pytest.raises(ConfigError, match="is no budget"):
        plan_upgrade(settings, "wide", -1.0)
    told = CliRunner().invoke(app, [*_flags(settings, "wide"), "--dry-run"])
    assert told.exit_code == 0 and "32 -> 48" in told.output and "12 samples" in told.output
    assert Ledger.open(settings.ledger).updates() == []
    with pytest.raises(ReleaseError, match="nothing is released yet"):
        switch_base(settings, wide.name, actor="ann", reason="r")


def _flags(settings: Settings, name: str) -> list[str]:
    words = ["--set", f"home={settings.home}", "--set", "base.clip=tiny"]
    words += ["--set", f"updater.recipe={settings.home / 'default.yaml'}"]
    words += ["--set", f'updater.reference=["{settings.home / "data" / "things"}"]', "--set", "updater.threads=1"]
    return [*words, "base", "upgrade", name]
