"""Which release a candidate is compared with, suite by suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.ledger import Ledger
from updater.gate.sample_suites import MOST_RIVALS, best_by_suite

BASE = "b" * 64


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    yield made
    made.close()


def judged(ledger: Ledger, name: str, scores: dict[str, float], base: str = BASE, *, share: float | None = 1.0) -> None:
    """An adapter with a verdict; released with a share, or not at all."""
    ledger.register_adapter(name, "clip", base, f"{name}-i", f"{name}-t", {})
    ledger.begin_update(
        f"u-{name}", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites: dict[str, Any] = {suite: {"after": 0.3 + score, "base": 0.3} for suite, score in scores.items()}
    ledger.record_verdict(f"u-{name}", name, "passed", "reports/x", {"suites": suites})
    if share is not None:
        live = ledger.live()
        number = live.number + 1 if live else 1
        ledger.commit_release(number, clip=name, vlm=None, actor="a", reason="r", proposal_id=None, share=share)


def best_releases(ledger: Ledger, suites: list[str], incumbent: str | None) -> dict[str, str]:
    return best_by_suite(ledger.released_verdicts("clip", BASE), suites, incumbent)


def test_each_suite_has_the_release_with_the_highest_score_above_the_base(ledger: Ledger) -> None:
    judged(ledger, "clip-1", {"flags": 0.2, "emoji": 0.0})
    judged(ledger, "clip-2", {"flags": 0.1, "emoji": 0.1})
    judged(ledger, "clip-3", {"flags": 0.1, "emoji": 0.05})
    found = best_releases(ledger, ["flags", "emoji", "new"], "clip-3")
    assert found == {"flags": "clip-1", "emoji": "clip-2"}


def test_the_incumbent_is_not_named_a_second_time(ledger: Ledger) -> None:
    judged(ledger, "clip-1", {"flags": 0.2})
    assert best_releases(ledger, ["flags"], "clip-1") == {}


def test_a_memory_suite_looks_back_to_when_its_domain_was_new(ledger: Ledger) -> None:
    judged(ledger, "clip-1", {"fresh.flags": 0.2})
    judged(ledger, "clip-2", {"memory.flags": 0.1})
    assert best_releases(ledger, ["memory.flags"], "clip-2") == {"memory.flags": "clip-1"}


def test_only_what_answered_everybody_on_this_base_and_was_not_withdrawn_counts(ledger: Ledger) -> None:
    judged(ledger, "clip-never", {"flags": 0.9}, share=None)
    judged(ledger, "clip-other", {"flags": 0.8}, base="c" * 64)
    judged(ledger, "clip-bad", {"flags": 0.7})
    ledger.withdraw(["clip-bad"], actor="guard", subject="release 2", reason="errors", evidence={})
    judged(ledger, "clip-good", {"flags": 0.1})
    judged(ledger, "clip-trial", {"flags": 0.6}, share=0.1)
    assert best_releases(ledger, ["flags"], None) == {"flags": "clip-good"}


def test_the_number_of_further_adapters_is_bounded(ledger: Ledger) -> None:
    names = [f"s{n}" for n in range(6)]
    for number, own in enumerate((names[:3], names[3:5], names[5:])):
        judged(ledger, f"clip-{number}", dict.fromkeys(own, 0.2))
    found = best_releases(ledger, names, None)
    assert len(set(found.values())) == MOST_RIVALS == 2 and set(found) == set(names[:5])
