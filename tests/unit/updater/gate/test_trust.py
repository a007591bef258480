"""Labels of a new domain that the base does not agree with. The base's towers are stand-ins: an image's vector is that
of its true caption, with noise, so the base recognises what is there, whatever a producer calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from core.ledger.rows import GateOutcome
from core.settings.updates import Gate
from tests.unit.updater.gate.builders import changed, fresh_suites, outcomes, question_rows, sample_rows, scores
from updater.gate.decision import Findings, Scores, conclude, decide
from updater.gate.score import Outcomes, Scorer
from updater.gate.suite_items import Item, majority
from updater.gate.suites import Suite
from updater.gate.trust import Chance, agreement, judge_sources, trust_warnings

CLIP = "clip-0123456789ab"
GATE = Gate()
COUNT = 120
KEPT = np.repeat([[1.0], [0.0]], [180, 20], axis=0)
RETENTION = scores("kept", KEPT, KEPT)


class Base(Scorer):
    """Sees of an image what is in the second half of its sample's ID; ``sight`` is the share of that in the vector."""

    def __init__(self, sight: float) -> None:
        self.sight = sight
        self.cache = None

    def images(self, items: Sequence[Item], adapter: str | None, label: str = "images") -> NDArray[np.float32]:
        seen = self.texts([item.sample_id.partition(" shows ")[2] for item in items], adapter)
        noise = self.texts([item.sample_id for item in items], adapter)
        return np.asarray(self.sight * seen + (1 - self.sight) * noise, np.float32)

    def texts(self, texts: Sequence[str], adapter: str | None, label: str = "texts") -> NDArray[np.float32]:
        return np.stack([_vector(text) for text in texts])


def _vector(text: str) -> NDArray[np.float32]:
    drawn = np.random.default_rng(list(text.encode())).normal(size=32)
    return np.asarray(drawn / np.linalg.norm(drawn), np.float32)


def samples(source: str, shift: int = 0, count: int = COUNT, domain: str = "boats") -> pa.Table:
    """Samples of a producer that gives each image the caption of the one ``shift`` further: at 0 it is honest."""
    truths = [f"{source} boat {i}" for i in range(count)]
    rows = sample_rows(count, domain, [truths[(i + shift) % count] for i in range(count)])
    ids = pa.array([f"{source}{i} shows {truth}" for i, truth in enumerate(truths)])
    return rows.set_column(0, "id", ids).append_column("source", pa.array([source] * count))


def judged(*producers: pa.Table, base: Scorer | None = None, **settings: Any) -> tuple[GateOutcome, str, Findings]:
    """The outcome for a candidate that learned all labels, its first reason, and what was found."""
    base, gate = base or Base(sight=0.5), GATE.model_copy(update=settings)
    fresh = fresh_suites(pa.concat_tables(producers))
    return _concluded([(suite, base.score(suite, None)) for suite in fresh], base.chance, gate)


def _concluded(answers: Sequence[tuple[Suite, Any]], chance: Chance, gate: Gate) -> tuple[GateOutcome, str, Findings]:
    gains = [
        Scores(suite, base, base, replace(base, **_all_right(base)), clusters=suite.clusters())
        for suite, base in answers
    ]
    levels = {"level": 0.05, "loss_level": 0.05, "margin": 0.1, "mean_margin": 0.1}
    findings = decide([RETENTION, *gains], **levels, min_items=gate.min_items)
    findings = replace(findings, trust=judge_sources(gains, chance, gate, CLIP))
    outcome, reasons = conclude(findings, ())
    return outcome, reasons[0], findings


def _all_right(base: Outcomes) -> dict[str, Any]:
    return {"ranks": np.zeros_like(base.ranks)}


def test_captions_that_are_exchanged_throughout_are_held_though_the_candidate_learned_them() -> None:
    outcome, reason, findings = judged(samples("vendor-7", shift=1))
    (row,) = findings.trust
    assert outcome == "inconclusive" and findings.gain is not None and findings.gain.decision == "passed"
    assert (row.suite, row.source, row.n, row.trusted) == ("fresh.boats", "vendor-7", COUNT, False)
    assert row.p > GATE.alpha and row.base < 2 * row.chance
    for part in ("fresh.boats", "'vendor-7'", "gate.trusted_sources", f"releases create --clip {CLIP} --force"):
        assert part in reason


def test_honest_captions_of_a_domain_that_the_base_hardly_knows_pass() -> None:
    outcome, _, findings = judged(samples("vendor-7"), base=Base(sight=0.2))
    (row,) = findings.trust
    assert outcome == "passed" and row.base < 0.5 and row.p <= GATE.alpha


def test_what_a_trusted_source_sends_passes_though_the_base_does_not_agree() -> None:
    for trusted in (["vendor-7"], ["*"]):
        outcome, _, findings = judged(samples("vendor-7", shift=1), trusted_sources=trusted)
        assert outcome == "passed" and findings.trust[0].trusted and findings.trust[0].p > GATE.alpha
    assert judged(samples("vendor-7", shift=1), trusted_sources=["vendor-8"])[0] == "inconclusive"


def test_a_mislabelling_source_next_to_an_honest_one_is_named() -> None:
    outcome, reason, findings = judged(samples("careful"), samples("vendor-7", shift=1))
    careful, vendor = findings.trust
    assert outcome == "inconclusive" and "'vendor-7'" in reason
    assert not careful.reason and not careful.lower and vendor.lower
    (warning,) = trust_warnings(findings.trust, findings.gain)
    assert "'vendor-7' less than with those of other sources" in warning


def test_honest_sources_are_not_said_to_differ() -> None:
    _, _, findings = judged(samples("careful"), samples("vendor-7"))
    assert not any(row.lower for row in findings.trust) and trust_warnings(findings.trust, findings.gain) == []


def test_small_sources_are_tested_together_and_few_samples_are_not_held() -> None:
    many = [samples(f"camera-{i}", shift=1, count=20) for i in range(6)]
    outcome, reason, findings = judged(samples("careful"), *many)
    assert outcome == "inconclusive" and "6 sources with few samples" in reason
    assert [(row.source, row.sources, row.n) for row in findings.trust] == [("careful", 1, COUNT), ("", 6, 120)]
    assert judged(samples("careful"), samples("camera", shift=1, count=10))[0] == "passed"


def test_a_gain_that_one_source_shows_is_said_to_be_one() -> None:
    _, _, findings = judged(samples("fluent"), samples("fluent", domain="cars"))
    (warning,) = trust_warnings(findings.trust, findings.gain)
    assert warning.startswith("all 240 held-out items come from the source 'fluent'")
    trusted = judged(samples("fluent"), trusted_sources=["fluent"])[2]
    for of in (judged(samples("fluent"), samples("other"))[2], trusted, replace(findings, gain=None)):
        assert trust_warnings(of.trust, of.gain) == []


def test_the_source_of_an_item_changes_neither_its_id_nor_the_suite() -> None:
    rows = samples("vendor-7")
    named, unnamed = (fresh_suites(each)[0] for each in (rows, rows.drop_columns(["source"])))
    assert named.digest() == unnamed.digest()
    assert {item.origin for item in named.items()} == {"vendor-7"} and {i.origin for i in unnamed.items()} == {""}


def test_a_gain_suite_of_the_operator_is_trusted() -> None:
    suite = Suite(name="mine", role="gain", task="retrieval", data="/pictures")
    hits = np.zeros((COUNT, 2))
    own = replace(scores("mine", hits, changed(hits, 0, 200), role="gain"), suite=suite)
    assert judge_sources([own], lambda *_: 0.5, GATE, CLIP) == ()


@pytest.mark.parametrize("right", [0.4, 0.9])
def test_answers_of_a_vlm_must_be_better_than_the_most_common_answer(right: float) -> None:
    rows = question_rows(COUNT).append_column("source", pa.array(["vendor-7"] * COUNT))
    (suite,) = fresh_suites(rows, family="vlm")
    hits = (np.random.default_rng(3).random((COUNT, 1)) < right).astype(float)

    def chance(suite: Suite, items: Sequence[Item]) -> float:
        return majority("exact_match", [item.answers for item in items])[1]

    base = replace(outcomes(hits), ids=np.array([item.id for item in suite.items()]))
    outcome, reason, findings = _concluded([(suite, base)], chance, GATE)
    assert findings.trust[0].chance == pytest.approx(1 / 3)
    assert outcome == ("passed" if right > 0.5 else "inconclusive"), reason


def test_answers_by_chance_are_shown_to_agree_as_seldom_as_the_level_says() -> None:
    draw = np.random.default_rng(5)
    clusters = np.repeat(np.arange(40), 2)
    found = [
        agreement(np.repeat(draw.random((40, 2)) < 0.1, 2, axis=0).astype(float), 0.1, clusters, 0.05).p_superior
        for _ in range(200)
    ]
    assert 0 < np.mean(np.array(found) <= 0.05) < 0.09
