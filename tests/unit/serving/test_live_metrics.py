from __future__ import annotations

import math
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from core.ledger import Family, Ledger
from serving.releases.controller import tell_of_live

FAMILIES: tuple[Family, ...] = ("clip", "vlm")


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_release_{name}", labels)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


def release(ledger: Ledger, number: int, clip: str | None) -> None:
    ledger.commit_release(number, clip=clip, vlm=None, actor="test", reason="test", proposal_id=None)
    tell_of_live(ledger, FAMILIES)


def judge(ledger: Ledger, adapter: str, after: float) -> None:
    """A verdict: on new data the base had 0.2; on old data it had 0.6, of which 0.02 were lost."""
    update = f"update-{adapter}-{after}"
    ledger.begin_update(
        update, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    suites = {
        "fresh": {"role": "gain", "base": 0.2, "after": after},
        "old": {"role": "retention", "base": 0.6, "after": 0.58},
    }
    ledger.record_verdict(update, adapter, "passed", "", {"suites": suites})


def test_each_live_release_shows_its_own_gain_and_forgetting(ledger: Ledger) -> None:
    judge(ledger, "clip-a", 0.5)
    release(ledger, 1, None)
    assert (value("gain_ratio", family="clip"), value("forgetting_ratio", family="clip")) == (0, 0)
    release(ledger, 2, "clip-a")
    assert value("gain_ratio", family="clip") == pytest.approx(0.3)
    assert value("forgetting_ratio", family="clip") == pytest.approx(0.02)
    assert value("gain_ratio", family="vlm") == 0
    release(ledger, 3, None)
    assert value("gain_ratio", family="clip") == 0
    live = ledger.live()
    assert live is not None and value("committed_timestamp_seconds") == live.created_at.timestamp()
    assert value("live", part="controller") == 3


def test_of_two_verdicts_on_an_adapter_the_newer_counts_and_without_one_nothing_is_claimed(ledger: Ledger) -> None:
    assert ledger.verdict_on("clip-b") is None
    release(ledger, 1, "clip-b")
    assert math.isnan(value("gain_ratio", family="clip") or 0)
    judge(ledger, "clip-b", 0.3)
    judge(ledger, "clip-b", 0.4)
    release(ledger, 2, "clip-b")
    assert value("gain_ratio", family="clip") == pytest.approx(0.2)
