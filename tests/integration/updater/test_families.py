"""One updater, two models: samples of both kinds on one stream, one budget, and no row in the wrong model."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.adapters import adapter_name
from tests.integration.updater import mortal_trainer
from tests.integration.updater.home import add_samples, commit, judged_as, made_by, make_vlm_home
from tests.integration.updater.test_kill import SECONDS
from updater.data.pools import Pair, Pools, Question
from updater.recipes import Family, load_recipe
from updater.service import train_update
from updater.service.update_loop import UpdaterService

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_vlm_home(tmp_path / "home")


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> None:
    judged_as("passed", monkeypatch)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[Family, Pools]:
    seen: dict[Family, Pools] = {}
    real = train_update.train

    def watched(base: Any, recipe: Any, pools: Pools, *rest: Any, **options: Any) -> Any:
        seen[recipe.family] = pools
        return real(base, recipe, pools, *rest, **options)

    monkeypatch.setattr(train_update, "train", watched)
    return seen


def every_third(offset: int) -> bool:
    return offset % 3 == 0


def test_both_models_learn_in_turn_from_one_stream_and_each_only_its_own_samples(
    settings: Settings, passing: None, trained: dict[Family, Pools]
) -> None:
    add_samples(settings, 36, asked=every_third)
    add_samples(settings, 18, split="fresh_eval", asked=every_third)
    updater = UpdaterService(settings)
    done = [updater.step().update for _ in range(2)]
    updates = {update.family: update for update in done if update is not None}
    assert set(updates) == {"clip", "vlm"}
    assert all(update.state == "done" for update in updates.values())
    seen = [updates["vlm"].cost[f"samples_{part}"] for part in ("new", "reference", "replay")]
    assert seen == [12, 16, 0]
    cost = updates["clip"].cost
    assert (cost["pending"], cost["samples_new"], cost["passed_over"]) == (24, 18, 6), "six steps of three new rows"
    for family, kind in (("clip", Pair), ("vlm", Question)):
        pools = trained[family]  # type: ignore[index]
        assert all(type(each) is kind for each in (*pools.new, *pools.reference))
        assert all(each.text.strip() for each in (*pools.new, *pools.reference))
    ledger = updater.ledger
    assert ledger.spent() == pytest.approx(sum(update.cost["gflops_spent"] for update in updates.values()))
    proposals = {proposal.family: proposal for proposal in ledger.pending_proposals()}
    assert (proposals["vlm"].vlm, proposals["vlm"].clip) == (updates["vlm"].adapter, None)
    assert (proposals["clip"].clip, proposals["clip"].vlm) == (updates["clip"].adapter, None)
    adapter = ledger.adapter(str(updates["vlm"].adapter))
    assert (adapter.family, adapter.image_space, adapter.text_space) == ("vlm", "", "")
    artifacts = Artifacts(settings.artifacts)
    assert adapter_name(artifacts.fetch(f"adapters/{adapter.name}")) == adapter.name
    report = json.loads(artifacts.read_bytes(f"reports/{updates['vlm'].id}/report.json"))
    assert "asked" in {suite["name"] for suite in report["suites"]}
    assert "things" not in {suite["name"] for suite in report["suites"]}


def test_a_pending_proposal_of_one_model_holds_only_that_one_back(
    settings: Settings, passing: None, trained: dict[Family, Pools]
) -> None:
    add_samples(settings, 12)
    updater = UpdaterService(settings)
    first = updater.step().update
    assert first is not None and first.family == "clip"
    add_samples(settings, 24, asked=every_third)
    reason = updater.step().reason  # 8 questions are too few, and the CLIP's proposal is not released
    assert "CLIP: proposal" in reason and "VLM: 8 of 10 new samples" in reason
    add_samples(settings, 6, asked=every_third)
    second = updater.step().update
    assert second is not None and (second.family, second.incumbent, second.data_from) == ("vlm", None, {})
    assert "CLIP: proposal" in updater.step().reason
    for proposal in updater.ledger.pending_proposals():
        commit(updater.ledger, proposal.clip, proposal.vlm, proposal.id)
    add_samples(settings, 30, asked=lambda offset: True)
    third = made_by(UpdaterService(settings, family="vlm"))
    assert (third.incumbent, third.data_from) == (second.adapter, second.data_to)
    assert (third.cost["pending"], third.cost["samples_new"], third.cost["samples_replay"]) == (30, 18, 10)
    assert {each.id for each in trained["vlm"].new}.isdisjoint(each.id for each in trained["vlm"].replay)


def test_a_model_that_cannot_be_judged_does_not_keep_the_other_from_learning(settings: Settings, passing: None) -> None:
    add_samples(settings, 36, asked=every_third)
    suite = settings.home / "suites" / "things.yaml"
    good = suite.read_text()
    suite.write_text("task: retrieval\ndata: ${home}/data/nowhere\n")
    updater = UpdaterService(settings)
    other = updater.step().update
    assert other is not None and (other.family, other.state) == ("vlm", "done")
    assert "nowhere" in updater.step().reason
    suite.write_text(good)
    left = updater.step().update
    assert left is not None and (left.family, left.state) == ("clip", "done")


def test_a_recipe_or_a_family_limits_the_updater_to_one_model(settings: Settings, passing: None) -> None:
    add_samples(settings, 36, asked=every_third)
    by_recipe = UpdaterService(settings, load_recipe(settings.home / "vlm-default.yaml"))
    by_family = UpdaterService(settings, family="vlm")
    assert list(by_recipe.turns) == list(by_family.turns) == ["vlm"]
    update = by_recipe.step().update
    assert update is not None and update.family == "vlm"
    assert "proposal" in by_family.step().reason
    assert by_family.ledger.unfinished_update("clip") is None


@pytest.mark.long
def test_a_killed_trainer_of_a_vlm_ends_in_the_same_adapter_and_is_charged_once(tmp_path: Path) -> None:
    """Killed during training: the teacher's features are computed again and are the same."""
    adapters = []
    for name in ("whole", "killed"):
        settings = make_vlm_home(tmp_path / name)
        add_samples(settings, 12, asked=lambda offset: True)
        add_samples(settings, 6, split="fresh_eval", asked=lambda offset: True)
        ledger = Ledger.open(settings.ledger)
        if name == "killed":
            killed = mortal_trainer.start(settings.home, "in the middle of training", vlm=True)
            assert killed.wait(SECONDS) == -signal.SIGKILL, killed.output()
            left = ledger.unfinished_update("vlm")
            assert left is not None and left.state == "training"
            assert ledger.spent() == ledger.spent(left.id) > 0
            assert list((settings.home / "updates").glob("*/checkpoint.safetensors"))
        UpdaterService(settings, family="vlm").step()
        (update,) = ledger.updates()
        assert update.state == "done"
        assert ledger.spent() == pytest.approx(update.cost["gflops_spent"])
        adapters.append((update.id, update.adapter, update.cost["gflops_spent"]))
    assert adapters[0] == adapters[1]
