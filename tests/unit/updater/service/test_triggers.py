"""When updates begin and when a candidate gets another interim analysis, over a real ledger and store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prometheus_client import REGISTRY

from core.ledger import Ledger
from core.ledger.rows import GateOutcome
from core.loading import load_settings
from core.settings import Settings
from ops.cli.status import audit_lines, learning_line
from streams.store.sample_store import SampleStore
from tests.integration.updater.home import add_samples
from tests.support.story import LOST, audit
from updater.gate.interim_analyses import AnalysisPlan, candidate_alpha
from updater.recipes import Recipe, load_recipe
from updater.service import triggers
from updater.service.learning_state import LedgerMetrics, learning_states
from updater.service.triggers import Learned, Ready, Reevaluate, Waiting

NEEDED = 16
FIRST = candidate_alpha(0.05, 0)
DETECT = 0.1703
"""So that 16 items are needed: the samples have 18 captions."""
D = TypeVar("D", Ready, Reevaluate, Waiting)


class Lab:
    """A ledger and a store without a model."""

    def __init__(self, home: Path) -> None:
        self.settings = load_settings(overrides={"home": home}, environ={})
        self.set("gate", min_items=5, detect=DETECT)
        self.set("updater", min_new_samples=10)
        self.ledger = Ledger.open(self.settings.ledger)
        self.store = SampleStore(self.settings.lake)
        self.recipe: Recipe = load_recipe("default")

    def add(self, count: int, fresh: bool = False) -> None:
        add_samples(self.settings, count, **({"split": "fresh_eval"} if fresh else {}))

    def waited_for_long(self) -> None:
        self.set("updater", max_wait_seconds=1e-3)

    def set(self, section: str, **values: Any) -> None:
        changed = getattr(self.settings, section).model_copy(update=values)
        self.settings: Settings = self.settings.model_copy(update={section: changed})

    def decide(self, kind: type[D], **how: bool) -> D:
        """The updater's decision, which must be of this kind."""
        decision = triggers.decide(self.settings, self.ledger, self.store, self.recipe, **how)
        assert isinstance(decision, kind), decision
        return decision

    def waits(self) -> str:
        return self.decide(Waiting).reason

    def begins(self, **how: bool) -> Ready:
        return self.decide(Ready, **how)

    def again(self) -> Reevaluate:
        return self.decide(Reevaluate)

    def learned(self) -> Learned:
        return Learned.of(self.ledger, self.store, "clip")

    def kept(self, **changes: Any) -> bool:
        return triggers.kept_candidate(self.ledger, replace(self.learned(), **changes)) is not None

    def plan(self, name: str | None = None) -> AnalysisPlan:
        update = None if name is None else self.ledger.update(name)
        return triggers.plan(self.settings.gate, self.ledger, "clip", update, halved=False)

    def judged(
        self, name: str, outcome: GateOutcome = "inconclusive", fresh: int = 8, made: bool = True, **cost: Any
    ) -> None:
        self.add(1)
        update = self.ledger.begin_update(
            name, family="clip", recipe=self.recipe.model_dump(mode="json"), seed=0, store_version=self.store.version(),
            data_from={}, data_to=self.store.offsets(), incumbent=self.learned().incumbent,
            adapter=f"clip-{triggers.split_id(name)[0]}", cost=cost,
        )  # fmt: skip
        plan = self.plan(name)
        look = plan.look(fresh)
        told = {**asdict(look), "next": look.next, "fresh": fresh, "candidates": plan.candidates, "made": made}
        summary = {"spent": made, "look": told}
        self.ledger.record_verdict(name, str(update.adapter), outcome, "reports/x", summary)
        self.ledger.advance_update(name, "done")

    def release(self, update_id: str) -> None:
        adapter = self.ledger.update(update_id).adapter
        proposal = self.ledger.propose("update", clip=adapter, vlm=None, actor="u", reason="r", update_id=update_id)
        live = self.ledger.live()
        number = live.number + 1 if live else 1
        self.ledger.commit_release(number, clip=adapter, vlm=None, actor="u", reason="r", proposal_id=proposal.id)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.ledger.close()


def test_an_update_waits_for_the_items_that_the_gate_needs_or_for_long_or_for_an_operator(lab: Lab) -> None:
    lab.add(12)
    lab.add(15, fresh=True)
    assert lab.waits().startswith("15 of 16 fresh items")
    for _ in range(2):
        lab.add(17)  # the captions repeat after 18
        lab.add(1, fresh=True)  # two items that are known
    assert lab.waits().startswith("15 of 16 fresh items")
    assert lab.begins(now=True).once
    lab.waited_for_long()
    ready = lab.begins()
    assert (ready.once, ready.fresh.items, ready.fresh.needed) == (False, 15, 16)
    lab.set("updater", max_wait_seconds=1e6)
    lab.add(1, fresh=True)
    ready = lab.begins()
    assert (ready.fresh.items, ready.fresh.needed) == (16, 16)


def test_an_inconclusive_candidate_is_asked_again_when_a_quarter_has_arrived_and_nothing_is_trained(lab: Lab) -> None:
    lab.add(8, fresh=True)
    lab.judged("u1", fresh=8)
    lab.add(17)  # the captions repeat after 18
    lab.waited_for_long()
    lab.add(3, fresh=True)
    assert lab.waits() == "11 of 16 fresh items: clip-u1 was inconclusive, and is asked again with 12"
    lab.add(1, fresh=True)
    again = lab.again()
    asked = again.candidate.update.adapter, again.candidate.next_id, again.store_version
    assert asked == ("clip-u1", "u1-look-2", lab.store.version())
    lab.judged("u1-look-2", fresh=12)
    lab.add(4, fresh=True)
    assert lab.again().candidate.next_id == "u1-look-3"


def test_after_the_look_with_all_items_a_candidate_is_given_up_and_the_next_update_trains(lab: Lab) -> None:
    lab.add(18, fresh=True)
    lab.judged("u1", fresh=8)
    lab.judged("u1-look-2", fresh=18)
    lab.add(12)
    state = learning_states(lab.settings, lab.ledger, lab.store)["clip"]
    assert state.fresh.candidate is None and state.fresh.needed > NEEDED, "the second candidate has a smaller share"
    lab.waited_for_long()
    assert lab.begins()


def test_a_candidate_is_kept_until_a_decision_a_newer_one_another_incumbent_or_a_withdrawal(lab: Lab) -> None:
    lab.judged("u1")
    assert lab.kept() and not lab.kept(incumbent="clip-other")
    lab.add(1)
    assert lab.waits() and lab.begins(now=True), "an operator may train anew"
    lab.ledger.register_adapter("clip-u1", "clip", "b", "i", "t", {})
    lab.ledger.withdraw(["clip-u1"], actor="guard", subject="s", reason="slow", evidence={})
    assert not lab.kept()
    outcomes: tuple[GateOutcome, ...] = ("inconclusive", "passed", "inconclusive", "rejected")
    for name, outcome in enumerate(outcomes, start=2):
        lab.judged(f"u{name}", outcome)
        assert lab.kept() == (outcome == "inconclusive")


def test_without_the_wait_updates_begin_by_samples_alone_and_no_candidate_is_kept(lab: Lab) -> None:
    assert lab.waits() == "there are no new samples"
    lab.judged("u1")
    lab.set("updater", wait_for_items=False)
    lab.add(9)
    assert lab.waits().startswith("9 of 10 new samples")
    lab.add(1)
    assert lab.begins().once
    lab.set("updater", min_new_samples=20)
    assert lab.waits()
    lab.waited_for_long()
    assert lab.begins(), "the oldest has waited for long enough"
    lab.set("budget", gflops_per_day=1000.0, gflops_per_update=900.0)
    assert lab.ledger.charge("somebody else", 200.0, now=time.time(), rate=0, capacity=1000)
    assert "the budget lacks" in lab.waits()


def test_a_stream_without_fresh_items_keeps_no_candidate_for_ever(lab: Lab) -> None:
    lab.judged("u1", fresh=0, made=False)
    lab.add(12)
    assert lab.waits()
    lab.waited_for_long()
    assert lab.begins()
    lab.add(2, fresh=True)
    assert lab.waits(), "some have come: there will be more"


def test_looks_at_one_candidate_share_what_it_may_spend_and_the_next_candidate_has_a_smaller_share(lab: Lab) -> None:
    def found(name: str | None = None) -> tuple[float, tuple[int, ...], int, int]:
        plan = lab.plan(name)
        assert plan.loss_alpha == 0.05, "each candidate's, whatever failed before"
        return plan.alpha, plan.tested, plan.needed, plan.candidates

    assert found() == (FIRST, (), NEEDED, 0)
    lab.judged("u1", fresh=4, made=False)
    assert found("u1") == found() == (FIRST, (), NEEDED, 0), "a test that could not be made spends nothing"
    lab.judged("u1-look-2", fresh=8)
    lab.judged("u1-look-3", fresh=12)
    assert found("u1-look-3") == (FIRST, (8, 12), NEEDED, 0)
    assert (found()[0], found()[3]) == (candidate_alpha(0.05, 1), 1)
    lab.judged("u2", "rejected", fresh=30)
    assert found()[3] == 2
    assert found("u1")[0] == FIRST, "it keeps the share that it began with"
    lab.judged("u3", "passed", fresh=40)
    lab.release("u3")
    assert found() == (FIRST, (), NEEDED, 0)


def test_what_an_operator_asked_for_is_judged_once_with_what_there_is(lab: Lab) -> None:
    lab.judged("u1", fresh=9, only_look=True)
    verdict = lab.ledger.verdict_of("u1")
    assert verdict is not None
    look = verdict.summary["look"]
    assert (look["needed"], look["spent"], look["next"]) == (9, pytest.approx(FIRST), None)
    assert not lab.kept()


def test_the_spread_is_taken_from_the_newest_verdicts_that_have_one(lab: Lab) -> None:
    gains = (
        ("u1", None),
        ("u2", {"units": 100, "spread": 0.1, "recall_spread": 0.1}),
        ("u3", {"units": 300, "spread": 0.1, "recall_spread": 0.2 * 2.6**0.5}),
    )
    for name, gain in gains:
        lab.ledger.begin_update(
            name, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
        )
        lab.ledger.record_verdict(name, f"clip-{name}", "rejected", "r", {"gain": gain, "spent": False})
    assert triggers.spread(lab.ledger.verdicts_of("clip")) == pytest.approx(((100 * 0.01 + 300 * 0.04) / 400) ** 0.5)
    assert triggers.spread(lab.ledger.verdicts_of("vlm")) is None
    assert lab.plan().needed < NEEDED


def test_the_state_of_learning_says_what_is_there_and_what_was_spent(lab: Lab) -> None:
    lab.add(8, fresh=True)
    lab.judged("u0", "rejected", fresh=20)
    lab.judged("u1", fresh=8)
    state = learning_states(lab.settings, lab.ledger, lab.store)["clip"]
    facts = state.to_json()
    assert facts["fresh_items"] == 8 and facts["fresh_items_needed"] > NEEDED
    assert (facts["kept"]["adapter"], facts["kept"]["looks"]) == ("clip-u1", 1)
    assert facts["alpha_spent"] == pytest.approx(candidate_alpha(0.05, 0) + candidate_alpha(0.05, 1))
    assert state.alpha_line.startswith("alpha 0.05 for gains until the next release: 0.038 spent, 0.012 left")


def test_the_state_of_learning_says_when_the_live_adapter_failed_its_audit_and_what_takes_it_back(lab: Lab) -> None:
    for number in (1, 2, 3):
        lab.ledger.register_adapter(f"clip-{number}", "clip", "b", "i", "t", {})
        lab.ledger.commit_release(number, clip=f"clip-{number}", vlm=None, actor="u", reason="r", proposal_id=None)
        audits = learning_states(lab.settings, lab.ledger, lab.store)["clip"].audits
        assert (audits.releases, audits.every, audits.failed, audits.rows) == (number, 8, None, ())
    lab.ledger.record_release_audit(audit(2, "clip-2", passed=True))
    lab.ledger.record_release_audit(audit(3, "clip-3"))
    facts = learning_states(lab.settings, lab.ledger, lab.store)["clip"].to_json()
    told = facts["audits"]
    assert (told["releases"], told["newest"]["release"], told["newest"]["passed"]) == (0, 3, False)
    assert told["failed"]["reason"] == LOST
    assert "`ratchet releases rollback --family clip --to 1`" in told["failed"]["advice"]
    (line,) = audit_lines({"clip": facts})
    assert line.plain.startswith(f"clip: the audit of release 3 failed, and it is live: {LOST}. `ratchet releases")
    assert f"audit: 0 of 8 releases since the last one\n  release 3 failed it: {LOST}" in learning_line("clip", facts)
    lab.ledger.commit_release(4, clip="clip-2", vlm=None, actor="u", reason="r", proposal_id=None)
    told = learning_states(lab.settings, lab.ledger, lab.store)["clip"].to_json()["audits"]
    assert told["failed"] is None and told["releases"] == 0, "clip-2 was audited"


def test_the_judgements_of_retention_items_are_counted_without_those_of_new_data(lab: Lab) -> None:
    suites = {"emoji": {"role": "retention", "used": 4}, "fresh.a": {"role": "gain", "used": 8}}
    lab.ledger.begin_update(
        "u1", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    lab.ledger.record_verdict("u1", "clip-u1", "rejected", "r", {"suites": suites})
    assert lab.ledger.judgements_of("clip") == {"emoji": 5, "fresh.a": 9}
    assert learning_states(lab.settings, lab.ledger, lab.store)["clip"].audits.used == 5


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels)


def judged(
    ledger: Ledger, number: int, outcome: GateOutcome, suites: dict[str, dict[str, Any]], **summary: Any
) -> None:
    update, adapter = f"update-{number}", f"clip-{number:012x}"
    ledger.begin_update(
        update, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    cost = {"gflops_planned": 10.0 * number, "gflops_spent": 8.0 * number}
    ledger.advance_update(update, "trained", adapter=adapter, cost=cost)
    ledger.record_verdict(update, adapter, outcome, "", {"suites": suites, **summary})
    ledger.advance_update(update, "done")


def suite(role: str, after: float, left: float | None) -> dict[str, Any]:
    return {"role": role, "base": 0.5, "before": 0.6, "after": after, "margin_left": left}


def test_the_last_verdict_cost_and_shift_are_exported_by_an_updater_that_has_just_started(ledger: Ledger) -> None:
    moved = {"from_incumbent": 0.01, "from_base": 0.03}
    judged(ledger, 1, "passed", {"fresh.facts": suite("gain", 0.9, None)})
    emoji = {"emoji.facts": suite("retention", 0.4, -0.07)}
    judged(ledger, 2, "rejected", emoji, diagnostics={"shift": {"towers": {"image": moved, "text": moved}}})
    exporter = LedgerMetrics(ledger)
    exporter.export(["clip", "vlm"])
    assert [value(f"update_{which}_flops", family="clip") for which in ("planned", "spent")] == [20e9, 16e9]
    score = {"family": "clip", "suite": "emoji.facts", "role": "retention"}
    scores = [value("gate_suite_score_ratio", **score, model=m) for m in ("base", "incumbent", "candidate")]
    assert scores == [0.5, 0.6, 0.4]
    assert value("gate_margin_left_ratio", family="clip", suite="emoji.facts") == -0.07
    assert value("gate_suite_score_ratio", family="clip", suite="fresh.facts", role="gain", model="base") is None
    verdicts, shift = "gate_last_verdict_timestamp_seconds", {"family": "clip", "tower": "image"}
    times = [value(verdicts, family="clip", outcome=each) for each in ("rejected", "passed")]
    assert times == [verdict.created_at.timestamp() for verdict in ledger.verdicts()]
    assert value(verdicts, family="vlm", outcome="passed") is None, "nothing is made up"
    shifts = [value("gate_feature_shift_ratio", **shift, model=each) for each in ("base", "incumbent")]
    assert shifts == [0.03, 0.01]
    judged(ledger, 4, "passed", {"b.facts": suite("retention", 0.5, 0.02)})  # by another process
    exporter.export(["clip"])
    left = [value("gate_margin_left_ratio", family="clip", suite=f"{each}.facts") for each in ("emoji", "b")]
    assert left == [None, 0.02] and value("gate_feature_shift_ratio", **shift, model="base") is None
