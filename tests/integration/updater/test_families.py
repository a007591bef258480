"""One updater, two models: samples of both kinds on one stream, one budget, and no row in the wrong model."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.adapters import adapter_name
from tests.integration.updater.home import add_samples, commit, judged_as, made_by, make_vlm_home, report_of
from tests.integration.updater.mortal_trainer import SECONDS, start
from updater.data.pools import Pair, Pools, Question
from updater.recipes import Family, load_recipe
from updater.service import train_update
from updater.service.learning_state import learning_states
from updater.service.update_loop import UpdaterService


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    judged_as("passed", monkeypatch)
    return make_vlm_home(tmp_path / "home")


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


def test_a_reference_folder_that_cannot_be_read_is_told_and_breaks_no_screen(settings: Settings) -> None:
    asked = settings.home / "data" / "asked"
    service = UpdaterService(settings)
    assert learning_states(settings, service.ledger, service.store)["vlm"].lacks == ""
    (asked / "data.csv").write_text("file,text\n")
    assert "asked" in learning_states(settings, service.ledger, service.store)["vlm"].lacks


def test_both_models_learn_in_turn_from_one_stream_each_its_own_samples_and_wait_for_their_own_proposals(
    settings: Settings, trained: dict[Family, Pools]
) -> None:
    add_samples(settings, 36, asked=every_third)
    add_samples(settings, 18, split="fresh_eval", asked=every_third)
    updater = UpdaterService(settings)
    updates = {update.family: update for update in (made_by(updater), made_by(updater))}
    clip, vlm = updates["clip"], updates["vlm"]
    assert [vlm.cost[f"samples_{part}"] for part in ("new", "reference", "replay")] == [12, 16, 0]
    seen = [clip.cost[name] for name in ("pending", "samples_new", "passed_over")]
    assert seen == [24, 18, 6], "six steps of three new rows"
    kinds: dict[Family, type] = {"clip": Pair, "vlm": Question}
    for family, kind in kinds.items():
        rows = (*trained[family].new, *trained[family].reference)
        assert all(type(each) is kind and each.text.strip() for each in rows)
    ledger = updater.ledger
    assert ledger.spent() == pytest.approx(sum(update.cost["gflops_spent"] for update in updates.values()))
    proposals = {proposal.family: proposal for proposal in ledger.pending_proposals()}
    assert (proposals["vlm"].vlm, proposals["vlm"].clip) == (vlm.adapter, None)
    assert (proposals["clip"].clip, proposals["clip"].vlm) == (clip.adapter, None)
    adapter = ledger.adapter(str(vlm.adapter))
    assert (adapter.family, adapter.image_space, adapter.text_space) == ("vlm", "", "")
    assert adapter_name(Artifacts(settings.artifacts).fetch(f"adapters/{adapter.name}")) == adapter.name
    suites = {suite["name"] for suite in report_of(settings, vlm)["suites"]}
    assert "asked" in suites and "things" not in suites

    commit(ledger, vlm=vlm.adapter, proposal_id=proposals["vlm"].id)  # the other one stays open
    add_samples(settings, 24, asked=every_third)
    reason = updater.step().reason
    assert "CLIP: proposal" in reason and "VLM: 8 of 10 new samples" in reason
    add_samples(settings, 6, asked=every_third)
    later = made_by(updater)
    assert (later.family, later.incumbent, later.data_from) == ("vlm", vlm.adapter, vlm.data_to)
    assert [later.cost[name] for name in ("pending", "samples_new", "samples_replay")] == [10, 10, 12]
    assert {each.id for each in trained["vlm"].new}.isdisjoint(each.id for each in trained["vlm"].replay)
    assert "CLIP: proposal" in updater.step().reason


def test_a_model_that_cannot_be_judged_does_not_keep_the_other_and_an_updater_may_be_of_one_model(
    settings: Settings,
) -> None:
    add_samples(settings, 36, asked=every_third)
    suite = settings.home / "suites" / "things.yaml"
    good = suite.read_text()
    suite.write_text("task: retrieval\ndata: ${home}/data/nowhere\n")
    updater = UpdaterService(settings)
    assert made_by(updater).family == "vlm"
    assert "nowhere" in updater.step().reason
    suite.write_text(good)
    by_recipe = UpdaterService(settings, load_recipe(settings.home / "vlm-default.yaml"))
    for one in (by_recipe, UpdaterService(settings, family="vlm")):
        assert list(one.turns) == ["vlm"] and one.step().update is None
    assert made_by(updater).family == "clip"


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
            killed = start(settings.home, "in the middle of training", vlm=True)
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
