"""``ratchet gate promise``: computed from suites, store and ledger, and without creating any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from core.ledger import Ledger, ReleaseAuditRow
from core.ledger.rows import GateOutcome
from core.loading import load_settings
from core.settings import Settings
from streams.store.sample_store import SampleStore
from tests.integration.updater.home import add_samples
from tests.support.command_line import ratchet
from tests.unit.updater.gate.builders import folder_dataset
from updater.gate.interim_analyses import PRIOR_SPREAD, candidate_alpha
from updater.service.promise import Promise, promises

ITEMS = 120
BASE = "b" * 64


class Home:
    """An installation with one suite of ITEMS pictures, and no model."""

    def __init__(self, home: Path) -> None:
        folder_dataset(home / "things", ITEMS)
        suite = home / "suites" / "things.yaml"
        suite.parent.mkdir()
        suite.write_text("task: classification\ndata: ${home}/things\nmargin: 0.1\n")
        self.home = home
        self.settings: Settings = load_settings(overrides={"home": home, "gate.suites": [suite]}, environ={})
        self.ledger: Ledger | None = None

    def opened(self) -> Ledger:
        self.ledger = self.ledger or Ledger.open(self.settings.ledger)
        return self.ledger

    def promise(self) -> Promise:
        return promises(self.settings)["clip"]

    def judged(
        self,
        name: str,
        outcome: GateOutcome,
        suites: dict[str, Any] | None = None,
        data_to: dict[str, int] | None = None,
    ) -> None:
        update = self.opened().begin_update(
            name, family="clip", recipe={}, seed=0, store_version=0, data_from={}, data_to=data_to or {},
            incumbent=None, adapter=f"clip-{name}",
        )  # fmt: skip
        look = {"loss_level": 0.05, "alpha": 0.03, "loss_alpha": 0.05, "needed": 100, "items": 100, "next": None}
        summary = {"spent": True, "look": {**look, "candidates": 0, "fresh": 100}, "suites": suites or {}}
        self.opened().record_verdict(update.id, f"clip-{name}", outcome, "reports/x", summary)
        self.opened().advance_update(name, "done")

    def release(self, adapter: str) -> int:
        ledger = self.opened()
        live = ledger.live()
        number = live.number + 1 if live else 1
        ledger.register_adapter(adapter, "clip", BASE, "i", "t", {})
        ledger.commit_release(number, clip=adapter, vlm=None, actor="u", reason="r", proposal_id=None)
        return number

    def audited(self, release: int, adapter: str, *, passed: bool) -> None:
        self.opened().record_release_audit(
            ReleaseAuditRow(
                family="clip", base=BASE, release=release, adapter=adapter, reference=None, reference_release=None,
                passed=passed, data_to={}, summary={"reasons": ["why"]},
            )
        )  # fmt: skip

    def show(self, *words: str) -> str:
        suites = json.dumps([str(path) for path in self.settings.gate.suites])
        return ratchet(self.home, "--set", f"gate.suites={suites}", "gate", "promise", *words, columns=300).output


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path / "home")
    yield made
    if made.ledger:
        made.ledger.close()


def measured(spread: float, units: int = 90, used: int = 0) -> dict[str, Any]:
    """A result of the suite whose interval at 5% has the width of this spread."""
    reach = float(stats.norm.isf(0.05)) * spread / units**0.5
    return {"things": {"role": "retention", "units": units, "ci": [-reach, reach], "used": used}}


def test_a_fresh_home_gets_a_table_and_is_told_what_is_missing_and_nothing_is_created(tmp_path: Path) -> None:
    home = tmp_path / "none"
    shown = ratchet(home, "gate", "promise", columns=300)
    assert shown.exit_code == 0 and not home.exists()
    for words in (
        "assumed, as there is no verdict yet", "no sample store yet", "nothing passes", "513 fresh needed, 0 there",
        "no sealed items", "nothing was judged yet", "no audit yet", "Not promised:", "data/openclipart does not exist",
    ):  # fmt: skip
        assert words in shown.output, words


def test_without_a_store_three_quarters_of_the_items_are_taken_as_judged_and_none_is_made(home: Home) -> None:
    promise, before = home.promise(), set(home.home.rglob("*"))
    assert not promise.counted and "about 90 judged, 30 sealed" in home.show()
    test = promise.suites[0]
    assert (test.units, test.sealed, test.spread) == (90, 30, PRIOR_SPREAD)
    assert set(home.home.rglob("*")) == before and not (home.home / "lake").exists()


def test_with_a_store_the_seal_counts_every_item_once(home: Home) -> None:
    add_samples(home.settings, 1)
    promise = home.promise()
    test, mean = promise.suites[0], promise.mean
    assert promise.counted and test.units + test.sealed == ITEMS and 10 < test.sealed < 50
    assert mean is not None and (mean.units, mean.sealed) == (test.units, test.sealed)
    assert f" {test.units} judged, {test.sealed} sealed" in home.show()


def test_what_was_learned_is_a_suite_of_the_samples_that_are_not_sealed(home: Home) -> None:
    add_samples(home.settings, 200, "fresh_eval", words=lambda offset: {"text": f"thing {offset}"})
    learned = SampleStore(home.settings.lake).offsets()
    add_samples(home.settings, 100, "fresh_eval", words=lambda offset: {"text": f"thing {offset}"})
    home.judged("u1", "passed", data_to=learned)
    home.release("clip-u1")
    tests = {test.name: test for test in home.promise().suites}
    memory = tests["memory.things"]
    assert 110 < memory.units < 190 and memory.sealed == 0 and memory.audit_finds is None
    assert home.promise().gain.fresh == pytest.approx(75, abs=20)


def test_power_follows_from_the_margin_the_items_and_the_spread_that_verdicts_measured(home: Home) -> None:
    home.judged("u1", "rejected", measured(0.3))
    home.judged("u2", "rejected", measured(0.5, used=1))
    test, mean = home.promise().suites[0], home.promise().mean
    assert test.spread == pytest.approx(0.412, abs=1e-3)  # the root of (0.09 + 0.25) / 2
    assert test.used == 2
    assert test.power == pytest.approx(0.745, abs=2e-3)  # Phi(0.1 sqrt(90) / 0.412 - 1.645)
    assert test.excludes == pytest.approx(0.108, abs=1e-3)  # (1.645 + 0.842) 0.412 / sqrt(90)
    assert mean is not None and mean.power == pytest.approx(0.097, abs=2e-3)  # with a margin of 0.015
    # beyond the margin of 0.1: (1.960 + 0.842) 0.412 / sqrt(30), 5% over two tests
    assert test.audit_finds == pytest.approx(0.311, abs=1e-3)


def test_a_suite_with_too_few_items_never_passes(home: Home) -> None:
    gate = home.settings.gate.model_copy(update={"min_items": 91})
    home.settings = home.settings.model_copy(update={"gate": gate})
    assert home.promise().suites[0].power == 0.0


def test_a_year_counts_candidates_and_not_looks_and_names_the_share_that_was_rejected(home: Home) -> None:
    home.judged("u1", "inconclusive")
    home.judged("u1-look-2", "rejected")
    home.judged("u2", "passed")
    year = home.promise().year
    assert (year.days, year.candidates, year.releases, year.rejected) == (1.0, 730.0, 0.0, 0.5)
    assert (year.harmful_at_most, year.harmful_expected) == (36.5, 18.25)
    assert "at most 18.2 harmful releases, if 50% of the candidates are harmful" in home.show()


def test_each_candidate_without_a_release_leaves_less_alpha_for_the_gain_of_the_next(home: Home) -> None:
    home.judged("u1", "rejected")
    gain = home.promise().gain
    assert (gain.candidates, gain.alpha) == (1, candidate_alpha(0.05, 1)) and gain.detects == 0.03
    gate = home.settings.gate.model_copy(update={"max_items": gain.needed // 4})
    home.settings = home.settings.model_copy(update={"gate": gate})
    assert home.promise().gain.detects == pytest.approx(0.06, abs=1e-3)  # half of the items' root


def test_the_lineage_has_its_last_audit_and_the_releases_since(home: Home) -> None:
    home.release("clip-1")
    assert "1 release since the first; no audit yet" in home.show()
    before = home.promise().suites[0].audit_finds
    home.audited(1, "clip-1", passed=True)
    home.release("clip-2")
    home.release("clip-3")
    lineage, finds = home.promise().lineage, home.promise().suites[0].audit_finds
    assert (lineage.every, lineage.since, lineage.last_release, lineage.last_passed) == (8, 2, 1, True)
    assert "2 releases since the audit of release 1" in home.show()
    assert before is not None and finds is not None and finds > before  # two references share its level


def test_the_json_has_the_same_numbers(home: Home) -> None:
    add_samples(home.settings, 1)
    told = json.loads(home.show("--json"))["clip"]
    assert told["suites"][0]["units"] == home.promise().suites[0].units
    assert told["year"]["harmful_at_most"] == 0.0 and told["lineage"]["every"] == 8
    assert SampleStore(home.settings.lake).version() > 0
