"""The updater over a real store, ledger and gate: when it begins, on which data, and what it leaves behind."""

from __future__ import annotations

import errno
from datetime import timedelta
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import REGISTRY

from core.artifacts import Artifacts
from core.errors import DiskFull, GateError, LedgerError, TrainingError
from core.ledger.learning import BEGAN
from core.settings import Settings
from ops.cli.doctor import examine
from serving.engines.adapters import adapter_name
from streams.store import maintenance
from tests.integration.updater.home import add_samples, changed, commit, judged_as, made_by, release, report_of
from tests.unit.updater.gate.builders import folder_dataset
from updater.families.clip_learner import ClipLearner
from updater.recipes import load_recipe
from updater.service import triggers
from updater.service import update_loop as service_module
from updater.service.learning_state import learning_states
from updater.service.update_loop import UpdaterService, run_update


@pytest.fixture(autouse=True)
def verdict(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    return judged_as("rejected", monkeypatch)


def ready_of(settings: Settings, service: UpdaterService, **how: bool) -> triggers.Ready:
    ready = triggers.decide(settings, service.ledger, service.store, service.recipes["clip"], **how)
    assert isinstance(ready, triggers.Ready)
    return ready


def unjudged() -> float | None:
    return REGISTRY.get_sample_value("ratchet_update_unjudged", {"family": "clip"})


def test_an_update_that_passes_is_stored_recorded_and_proposed(settings: Settings, verdict: dict[str, str]) -> None:
    add_samples(settings, 12, partition=0)
    add_samples(settings, 12, partition=1)
    add_samples(settings, 8, split="fresh_eval")
    verdict["outcome"] = "passed"
    service = UpdaterService(settings)
    update = made_by(service)
    assert update.data_to == service.store.offsets() and update.data_from == {}
    assert "merge_weight" not in update.cost
    assert update.cost["trigger"] == "samples: 24 new"
    adapter = service.ledger.adapter(str(update.adapter))
    artifacts = Artifacts(settings.artifacts)
    assert adapter_name(artifacts.fetch(f"adapters/{adapter.name}")) == adapter.name
    report = report_of(settings, update)
    assert artifacts.read_bytes(f"reports/{update.id}/report.html").startswith(b"<!")
    assert {check["name"]: check["ok"] for check in report["checks"]}["parity"]
    assert "fresh.things" in {suite["name"] for suite in report["suites"]}
    assert {suite["half"] for suite in report["suites"]} == {"all"} and "tuned_on" not in report["meta"]
    (proposal,) = service.ledger.pending_proposals()
    assert (proposal.kind, proposal.clip, proposal.update_id) == ("update", update.adapter, update.id)
    assert 0 < update.cost["gflops_spent"] == pytest.approx(update.cost["gflops_planned"])
    assert service.ledger.spent(update.id) == pytest.approx(update.cost["gflops_spent"])
    assert update.cost["gate_gflops"] > 0
    assert not service.work_dir(update).exists()


def test_rejected_data_is_not_tried_again_by_itself_but_by_another_recipe_or_on_request(settings: Settings) -> None:
    with pytest.raises(TrainingError, match="no new samples"):
        run_update(settings, once=True)
    add_samples(settings, 4)  # fewer than the trigger wants, but asked for
    outcome = run_update(settings, once=True, recipe=str(settings.home / "naive.yaml"))
    assert outcome is not None and outcome.update is not None and outcome.update.recipe["name"] == "naive"
    add_samples(settings, 12)
    naive = UpdaterService(settings, load_recipe(settings.home / "naive.yaml"))
    first = made_by(naive)
    assert naive.step().reason == "there are no new samples"
    again = made_by(naive, retry=True)
    assert again.id != first.id and again.adapter == first.adapter  # same data, recipe and seed
    default = made_by(UpdaterService(settings))
    assert default.data_from == {} and default.adapter != first.adapter


def test_data_counts_as_learned_once_its_adapter_is_live_and_no_more_after_a_rollback(
    settings: Settings, verdict: dict[str, str]
) -> None:
    """Learned data is replayed in the next update; a recipe without memory leaves nothing else for it."""
    add_samples(settings, 12)
    verdict["outcome"] = "passed"
    service = UpdaterService(settings)
    first = made_by(service)
    add_samples(settings, 11)
    assert "proposal" in service.step().reason  # not released yet
    release(service.ledger)
    second = made_by(service)
    assert (second.incumbent, second.data_from) == (first.adapter, first.data_to)
    assert (second.cost["samples_new"], second.cost["samples_replay"]) == (11, 12)
    assert second.cost["samples_reference"] > 0
    assert not Artifacts(settings.artifacts).exists("memories")
    release(service.ledger)
    commit(service.ledger, clip=first.adapter)
    learned = ready_of(settings, service, retry=True).learned
    assert (learned.incumbent, learned.data_from) == (first.adapter, first.data_to)


def test_an_update_that_libraries_break_off_fails_with_its_reason_after_three_attempts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each attempt in its own process: only the ledger remains of it. Neither a full disk nor a requested stop counts
    as an attempt.
    """
    add_samples(settings, 12)
    full = OSError(errno.ENOSPC, "No space left on device")
    for raised, seen in ((full, DiskFull), (SystemExit(0), SystemExit)) * 4:
        monkeypatch.setattr(service_module, "train_update", Mock(side_effect=raised))
        with pytest.raises(seen):
            UpdaterService(settings).step()
    broken = Mock(side_effect=ValueError("absolute aspect ratio must be smaller than 200"))
    monkeypatch.setattr(service_module, "train_update", broken)
    for attempt in (1, 2):
        with pytest.raises(TrainingError, match=f"attempt {attempt} of 3: ValueError: absolute aspect ratio"):
            UpdaterService(settings).step()
    service = UpdaterService(settings)
    update = made_by(service, "failed")
    assert broken.call_count == 3
    assert "broke off 3 times; the last reason is ValueError: absolute aspect ratio" in str(update.error)
    assert service.step().reason == "there are no new samples"
    assert update.id not in service.store.pins()


def test_a_process_that_dies_three_times_at_one_place_fails_the_update(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an out-of-memory kill, after which no code runs."""
    add_samples(settings, 12)

    class Died(BaseException):
        pass

    monkeypatch.setattr(service_module, "train_update", Mock(side_effect=Died))
    for _ in range(3):
        service = UpdaterService(settings)
        with monkeypatch.context() as dead:  # what takes the mark back does not run in a process that was killed
            advance = service.ledger.advance_update

            def marks(name: str, *given: str, advance: Any = advance, **values: Any) -> Any:
                return None if values.get("cost") == {BEGAN: None} else advance(name, *given, **values)

            dead.setattr(service.ledger, "advance_update", marks)
            with pytest.raises(Died):
                service.step()
    service = UpdaterService(settings)
    update = made_by(service, "failed")
    assert "the process ended 3 times in it (training) without saying why: killed, for memory?" in str(update.error)
    monkeypatch.undo()
    assert service.ledger.retry_update(update.id, actor="ann").state == "training"
    assert service.step().update is not None


def test_a_process_that_dies_further_on_each_time_fails_nothing(settings: Settings) -> None:
    add_samples(settings, 12)
    service = UpdaterService(settings)
    update = service._begin(service.recipes["clip"], ready_of(settings, service, now=True))
    prepared = service.work_dir(update) / "prepared"
    prepared.mkdir(parents=True)
    for shard in range(5):
        service._count_death(update)
        (prepared / f"new-{shard}.safetensors").touch()
    for _ in range(3):
        service._count_death(update)
    with pytest.raises(TrainingError, match="ended 3 times"):
        service._count_death(update)


def test_an_operator_ends_an_update_in_training_and_its_samples_are_learned_later(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_samples(settings, 12)
    monkeypatch.setattr(service_module, "ASK_SECONDS", 0.0)
    service = UpdaterService(settings)
    backward = ClipLearner.forward_backward

    def ended_meanwhile(learner: ClipLearner, rows: list[int], regularized: bool = True) -> Any:
        running = service.ledger.unfinished_update("clip")
        if running is not None:
            service.ledger.abandon_update(running.id, actor="ann", reason="broken pictures")
        return backward(learner, rows, regularized)

    with monkeypatch.context() as patch:
        patch.setattr(ClipLearner, "forward_backward", ended_meanwhile)
        update = made_by(service, "failed")
    assert update.error == "abandoned by ann: broken pictures"
    assert not service.work_dir(update).exists() and update.id not in service.store.pins()
    (row,) = service.ledger.audit_rows(subject=f"update {update.id}")
    assert (row.actor, row.action, row.detail["reason"]) == ("ann", "update.abandon", "broken pictures")
    with pytest.raises(LedgerError, match="has ended"):
        service.ledger.advance_update(update.id, "trained")
    with pytest.raises(LedgerError, match="has ended already"):
        service.ledger.abandon_update(update.id, actor="ann", reason="again")
    again = made_by(service, retry=True)
    assert again.id != update.id and (again.data_from, again.data_to) == (update.data_from, update.data_to)
    with pytest.raises(LedgerError, match="is not the newest one"):
        service.ledger.retry_update(update.id, actor="ann")


def test_without_suites_or_reference_nothing_is_begun_and_spent_and_it_is_told(settings: Settings) -> None:
    things = "task: retrieval\ndata: ${home}/data/things\n"
    add_samples(settings, 12)
    file, data = settings.home / "suites" / "things.yaml", settings.home / "data"
    for suite, reference, reason in (
        ("task: retrieval\ndata: ${home}/data/nothing\n", "things", "nothing does not exist"),
        (f"{things}role: gain\n", "things", "no retention suite"),
        (f"{things}margin: 0.9\n", "", "no reference pool"),
        (f"{things}margin: 0.9\n", "gone", "gone does not exist"),
    ):
        file.write_text(suite)
        settings = changed(settings, "updater", reference=[data / reference] if reference else [])
        service = UpdaterService(settings)
        outcome = service.step()
        assert outcome.update is None and reason in outcome.reason
        assert not service.ledger.updates() and service.ledger.spent() == 0
        assert unjudged() == 1
        assert reason in learning_states(settings, service.ledger, service.store)["clip"].lacks
    (finding,) = [each for each in examine(settings) if each.what == "suites"]
    assert finding.state == "warn" and reason in finding.found
    folder_dataset(data / "gone", count=30)
    assert service.step().update is not None and unjudged() == 0


def test_an_inconclusive_candidate_is_asked_again_without_training_also_after_a_kill(
    settings: Settings, verdict: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = changed(settings, "updater", wait_for_items=True, max_wait_seconds=1e-3)
    service = UpdaterService(changed(settings, "gate", detect=0.1703))  # 16 items are needed
    add_samples(settings, 12)
    add_samples(settings, 8, split="fresh_eval")
    verdict["outcome"] = "inconclusive"
    first = made_by(service)
    assert service.step().reason.startswith("8 of 16 fresh items")
    add_samples(settings, 8, split="fresh_eval")

    killed = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("updater.service.train_update.train", killed)  # nothing is trained from here on
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(service_module, "gate_update", killed)
        service.step()
    verdict["outcome"] = "passed"
    second = made_by(service)
    assert (second.id, second.adapter) == (f"{first.id}-look-2", first.adapter)
    assert second.store_version > first.store_version and second.data_to == first.data_to
    assert len(service.ledger.updates()) == 2
    looks = [row.summary["look"] for row in reversed(service.ledger.verdicts())]
    assert [(look["number"], look["items"], look["next"]) for look in looks] == [(1, 8, 12), (2, 16, None)]
    (proposal,) = service.ledger.pending_proposals()
    assert (proposal.clip, proposal.update_id) == (first.adapter, second.id)
    assert report_of(settings, second)["fresh"] == 16
    release(service.ledger)
    assert service.step().reason == "there are no new samples"


def test_suites_that_go_while_it_trains_leave_the_update_trained_until_they_are_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_samples(settings, 12)
    suites, train_update = settings.home / "suites", service_module.train_update

    def training(*given: Any, **options: Any) -> Any:
        update = train_update(*given, **options)
        suites.rename(settings.home / "gone")
        return update

    monkeypatch.setattr(service_module, "train_update", training)
    service = UpdaterService(settings)
    with pytest.raises(GateError):
        service.step()
    assert unjudged() == 1
    waiting = service.ledger.unfinished_update("clip")
    assert waiting is not None and waiting.state == "trained"
    (settings.home / "gone").rename(suites)
    assert made_by(service).id == waiting.id


def test_an_update_whose_data_is_not_kept_any_more_is_abandoned(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_samples(settings, 12)
    service = UpdaterService(settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("updater.service.train_update.train", Mock(side_effect=KeyboardInterrupt))
        service.step()
    add_samples(settings, 12)
    service.store.unpin(service.ledger.updates(1)[0].id)
    maintenance.clean(service.store, keep=timedelta(0))
    update = made_by(service, "abandoned")
    assert "not kept" in str(update.error)
