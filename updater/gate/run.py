"""One gate run: candidate, incumbent and base answer the same suites through the serving engine -> Verdict."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ops.errors import GateError
from ops.progress import say
from ops.settings import Gate as GateSettings
from serving.engines.clip import ClipEngine
from updater.gate.checks import (
    Encode,
    check_collapse,
    check_drift,
    check_finite,
    check_latency,
    check_parity,
    check_size,
)
from updater.gate.decision import Scores, conclude, decide
from updater.gate.score import Scorer
from updater.gate.statistics import spend
from updater.gate.suites import Item, Suite
from updater.gate.verdict import Check, SuiteResult, Verdict
from updater.gate.worst import worst_items

PROBE = 64
"""Items that the engineering checks look at."""
LATENCY_BATCH = 8


def run_gate(
    *,
    engine: ClipEngine,
    candidate: str,
    incumbent: str | None,
    suites: Sequence[Suite],
    fresh: Suite | Sequence[Suite],
    looks: int,
    settings: GateSettings,
    parity: Encode | None = None,
    cost: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> Verdict:
    """Judge `candidate`. Candidate and incumbent are resident in the engine under their names.

    Args:
        engine: the serving engine; what is gated is what is served.
        candidate: adapter name. If it is not resident (it would not load), the verdict says so.
        incumbent: adapter of the live release; None is the base alone.
        suites: retention suites, and gain suites of the user.
        fresh: gain suite(s) from `fresh_eval`, see `fresh_suite`.
        looks: verdicts since the last release (`Ledger.looks_since_release`).
        settings: alpha, default margin and min_items.
        parity: the trainer's model, to compare with what the engine serves.
        cost: shown in the report: maf_planned, maf_spent, seconds, steps, ...
        meta: shown in the report: recipe, data_from, data_to, update, ...; `tuned_on` (names of suites that the
            recipe was tuned on: their verdict falls on the hidden half), `load_error` (why the candidate is not
            resident), `rank` and `bytes` of the adapter.
        cache: folder of kept scores; by default the suite's own, `home/cache/gate`.

    Raises:
        GateError: a suite cannot be read, or base or incumbent cannot be scored. A bad candidate never raises.
    """
    started = time.monotonic()
    facts = dict(meta or {})
    asked = [_asked(suite, facts) for suite in (*suites, *_sequence(fresh))]
    for suite in asked:
        suite.items()  # missing data are an error of the suite, and must not look like one of the candidate
    level = spend(settings.alpha, looks)
    scorer = Scorer(engine, cache)
    checks = _checks(scorer, candidate, asked, parity, facts)
    results: list[SuiteResult] = []
    if all(check.ok for check in checks if check.name in ("loads", "finite")):
        results, trouble = _suites(scorer, candidate, incumbent, asked, settings, level)
        checks += trouble
    outcome, reasons = conclude(results, checks)
    verdict = Verdict(
        outcome=outcome,
        reasons=reasons,
        candidate=candidate,
        incumbent=incumbent,
        base=engine.base.name,
        suites=tuple(results),
        checks=tuple(checks),
        alpha=settings.alpha,
        level=level,
        looks=looks,
        seconds=time.monotonic() - started,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cost=dict(cost or {}),
        meta={**facts, "base_digest": engine.base.digest},
    )
    say(f"gate: {candidate} {outcome} in {verdict.seconds:.0f} s: {reasons[0]}")
    return verdict


def _suites(
    scorer: Scorer,
    candidate: str,
    incumbent: str | None,
    suites: Sequence[Suite],
    settings: GateSettings,
    level: float,
) -> tuple[list[SuiteResult], list[Check]]:
    scores = []
    for number, suite in enumerate(suites, start=1):
        say(f"gate: suite {number}/{len(suites)} {suite.name} ({len(suite.items())} items)")
        try:
            base = scorer.score(suite, None, label=f"{suite.name}, base")
            before = base if incumbent is None else scorer.score(suite, incumbent, label=f"{suite.name}, incumbent")
        except (RuntimeError, ValueError) as error:
            raise GateError(
                f"suite {suite.name}: base or incumbent cannot be scored: {error}",
                "Nothing can be judged without them; check the base and the live adapter (`ratchet doctor`).",
            ) from error
        try:
            after = scorer.score(suite, candidate, label=f"{suite.name}, candidate")
        except Exception as error:  # a bad candidate is rejected, it does not end the updater
            if isinstance(error, GateError):
                raise
            return [], [Check("scores", False, f"the candidate failed on suite {suite.name}: {error!r}"[:300])]
        worst = worst_items(scorer, suite, before, after)
        scores.append(Scores(suite, base, before, after, scorer.chance(suite), worst))
    return decide(scores, level=level, margin=settings.margin, min_items=settings.min_items), []


def _checks(
    scorer: Scorer, candidate: str, suites: Sequence[Suite], parity: Encode | None, facts: Mapping[str, Any]
) -> list[Check]:
    engine = scorer.engine
    if candidate not in engine.resident:
        reason = str(facts.get("load_error") or f"{candidate} is not resident in the engine")
        return [Check("loads", False, reason[:300])]
    checks = [Check("loads", True, "the adapter is complete, fits the base and has the digest it is named by")]
    probe = _probe(suites)
    if len(probe) < 2:
        return checks
    texts = sorted({item.text for item in probe})
    pixels = np.stack([scorer.pixels(item) for item in probe])
    base_images, base_texts = scorer.images(probe, None), scorer.texts(texts, None)
    try:
        images, words = scorer.images(probe, candidate), scorer.texts(texts, candidate)
        checks.append(check_finite(images, words))
        if not checks[-1].ok:
            return checks
        checks.append(check_collapse("image", base_images, images))
        if len(texts) > 2:
            checks.append(check_collapse("text", base_texts, words))
        checks.append(check_drift(engine.model(None).state_dict(), engine.model(candidate).state_dict()))
        if parity is not None:
            few, own = pixels[:16], texts[:16]
            checks.append(check_parity(parity, few, own, (images[:16], words[:16])))
        checks.append(
            check_latency(engine, candidate, pixels[:LATENCY_BATCH], [t[:100] for t in texts[:LATENCY_BATCH]])
        )
        checks.append(check_size(facts.get("rank"), facts.get("bytes")))
    except Exception as error:  # a candidate that breaks the engine is rejected, with a report
        checks.append(Check("finite", False, f"the candidate failed on the probe: {error!r}"[:300]))
    return checks


def _probe(suites: Sequence[Suite]) -> list[Item]:
    """A few items of every suite, PROBE in all."""
    share = max(2, PROBE // max(len(suites), 1))
    chosen: dict[str, Item] = {}
    for suite in suites:
        items = suite.items()
        for item in items[:: max(1, len(items) // share)][:share]:
            chosen.setdefault(item.id, item)
    return list(chosen.values())[:PROBE]


def _asked(suite: Suite, facts: Mapping[str, Any]) -> Suite:
    """A suite that the recipe was tuned on is judged on its hidden half."""
    tuned: Iterable[str] = facts.get("tuned_on") or ()
    return suite.half("hidden") if suite.name in set(tuned) else suite


def _sequence(fresh: Suite | Sequence[Suite]) -> Sequence[Suite]:
    return (fresh,) if isinstance(fresh, Suite) else fresh
