"""One gate run: candidate, incumbent and base answer the same suites through the serving engine -> Verdict. Differences
between model families are in :class:`Evaluator`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache as once
from pathlib import Path
from typing import Any, Protocol, TypeVar

from core.errors import AdapterError, GateError, RatchetError
from core.progress import progress_log
from core.settings import Settings
from core.settings.updates import Gate as GateSettings
from serving.engines.calibration import MOST_ERROR
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead
from updater.gate.clip import ClipEvaluator, live_clip
from updater.gate.crossings import CrossVersion
from updater.gate.decision import Findings, ItemScores, Scores, conclude, decide
from updater.gate.diagnostics import ConceptCounts, measure_tail
from updater.gate.interim_analyses import AnalysisPlan, InterimAnalysis
from updater.gate.suite_items import Item
from updater.gate.suites import Family, Suite
from updater.gate.trust import judge_sources, trust_warnings
from updater.gate.verdict import YES_BOUND, Check, Diagnostics, Regression, Verdict
from updater.gate.vlm import VlmEvaluator

M = TypeVar("M", bound=ItemScores)


class Evaluator(Protocol[M]):
    @property
    def family(self) -> Family:
        pass

    @property
    def base(self) -> ClipBase | VlmBase:
        pass

    def load(self, name: str, directory: Path, *, candidate: bool = False) -> None:
        """Make an adapter resident. Raises AdapterError; GateError if the engine is dead. A `candidate` is also
        compared with the trainer's model."""

    def checks(self, candidate: str, suites: Sequence[Suite], facts: Mapping[str, Any]) -> list[Check]:
        """Engineering checks before scoring, which is skipped if those named `loads` or `finite` fail."""

    def score(self, suite: Suite, adapter: str | None, *, label: str = "") -> M:
        """Answers of one model (None is the base) to one suite. Raises GateError if no model could answer."""

    def answer_checks(self, candidate: str, suites: Sequence[Suite]) -> list[Check]:
        """Engineering checks of the answers to all suites, after scoring."""

    def cross_version(
        self, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
    ) -> CrossVersion | None:
        """Recall of the candidate's texts among images that the incumbent embedded; None if not applicable."""

    def diagnostics(self, scores: Sequence[Scores], incumbent: str | None, candidate: str) -> Diagnostics:
        pass

    def chance(self, suite: Suite, some: Sequence[Item] | None = None) -> float:
        """Score of guessing for some items of a suite; None: all."""

    def regressions(self, suite: Suite, before: M, after: M) -> tuple[Regression, ...]:
        """Items that were right before and are wrong now."""


@contextmanager
def open_evaluator(settings: Settings, base: ClipBase | VlmBase) -> Iterator[Evaluator[Any]]:
    """Open an engine of `base` as in serving: a CLIP in this process, a VLM in the engine that the settings name.
    Raises GateError if the VLM engine does not start."""
    if isinstance(base, ClipBase):
        yield ClipEvaluator(ClipEngine.of(settings, base, threads=settings.updater.threads))
        return
    from serving.engines.vlm.open import SyncVlm, open_engine

    vlm = SyncVlm(open_engine(base, settings.serve))
    with ExitStack() as stack:
        try:
            stack.enter_context(vlm)
        except EngineDead as error:
            raise GateError(f"the VLM engine does not start: {error.message}", error.fix) from error
        clip = once(lambda: live_clip(settings))
        yield VlmEvaluator(vlm, settings.serve, clip, cache=settings.home / "cache" / "gate")


def run_gate(
    *,
    evaluator: Evaluator[M],
    candidate: str,
    incumbent: str | None,
    suites: Sequence[Suite],
    fresh: Sequence[Suite],
    plan: AnalysisPlan,
    settings: GateSettings,
    best: Mapping[str, str] | None = None,
    used: Mapping[str, int] | None = None,
    counts: ConceptCounts | None = None,
    cost: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judge `candidate`. Candidate and incumbent are resident in the engine under their names.

    Args:
        candidate: if it is not resident (it would not load), the verdict says so.
        incumbent: adapter of the live release; None is the base alone.
        suites: retention suites, and gain suites of the user, all of the evaluator's family.
        fresh: gain suites from `fresh_eval`, see `fresh_suites`.
        plan: budget and history of the looks at this candidate; `AnalysisPlan.alone` for a single one.
        best: by retention suite the adapter of the best release so far, resident in the engine.
        used: earlier judgements by suite.
        counts: frequency of concepts in the candidate's training data; without them results are not split by it.
        meta: for the report. `tuned_on`: suites that the recipe was tuned on, judged on their hidden half;
            `load_error`: why the candidate is not resident; `rank` and `bytes` of the adapter.

    Raises GateError: a suite cannot be read, or base or incumbent cannot be scored. A bad candidate never raises.
    """
    started = time.monotonic()
    facts = dict(meta or {})
    tuned = facts.get("tuned_on") or ()
    gated = [suite.half("hidden") if suite.name in tuned else suite for suite in (*suites, *fresh)]
    for suite in gated:
        if suite.family != evaluator.family:
            raise GateError(
                f"suite {suite.name}: a {evaluator.family.upper()} cannot be asked for {suite.task}.",
                f"Ask it suites of its family (`load_suites(..., family={evaluator.family!r})`).",
            )
        suite.items()  # missing data are an error of the suite, and must not look like one of the candidate
    look = plan.look(sum(suite.units() for suite in gated if suite.role == "gain"))
    checks = evaluator.checks(candidate, gated, facts)
    early = len(checks)
    findings = Findings((), None)
    scores: list[Scores] = []
    if all(check.ok for check in checks if check.name in ("loads", "finite")):
        findings, failed, scores = _suites(
            evaluator, candidate, incumbent, gated, best or {}, used or {}, settings, look
        )
        checks += failed
    # Checks of the answers come after the tests, and do not undo the spending of alpha.
    sound = all(check.ok for check in checks[:early])
    outcome, reasons = conclude(findings, checks)
    crossing = None
    if outcome == "passed":
        crossing = evaluator.cross_version(gated, incumbent, candidate, settings.margin, settings.alpha)
    beside = diagnose(evaluator, scores, incumbent, candidate, counts)
    verdict = Verdict(
        outcome=outcome,
        reasons=reasons,
        candidate=candidate,
        incumbent=incumbent,
        base=evaluator.base.name,
        suites=findings.results,
        gain=findings.gain,
        mean=findings.mean,
        trust=findings.trust,
        spent=sound and findings.tested,
        checks=tuple(checks),
        alpha=settings.alpha,
        look=look,
        candidates=plan.candidates,
        fresh=sum(suite.units() for suite in gated[len(suites) :]),
        seconds=time.monotonic() - started,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        cost=dict(cost or {}),
        meta={**facts, "base_digest": evaluator.base.digest},
        cross_version=crossing,
        diagnostics=replace(beside, warnings=(*trust_warnings(findings.trust, findings.gain), *beside.warnings)),
    )
    progress_log.info(f"gate: {candidate} {outcome} in {verdict.seconds:.0f} s: {reasons[0]}")
    return verdict


def _suites(
    evaluator: Evaluator[M],
    candidate: str,
    incumbent: str | None,
    suites: Sequence[Suite],
    best: Mapping[str, str],
    used: Mapping[str, int],
    settings: GateSettings,
    look: InterimAnalysis,
) -> tuple[Findings, list[Check], list[Scores]]:
    """Results, checks of the answers, and the answers of all suites; no answers if the candidate failed."""
    scores: list[Scores] = []
    for number, suite in enumerate(suites, start=1):
        progress_log.info(f"gate: suite {number}/{len(suites)} {suite.name} ({len(suite.items())} items)")
        try:
            base = evaluator.score(suite, None, label=f"{suite.name}, base")
            before = base if incumbent is None else evaluator.score(suite, incumbent, label=f"{suite.name}, incumbent")
            rival = best.get(suite.name, "") if suite.role == "retention" else ""
            rival = "" if rival in (incumbent, candidate) else rival
            released = evaluator.score(suite, rival, label=f"{suite.name}, best release") if rival else None
        except (RuntimeError, ValueError, AdapterError) as error:
            raise GateError(
                f"suite {suite.name}: base, incumbent or best release cannot be scored: {error}",
                "Nothing can be judged without them; check the base and the live adapter (`ratchet doctor`).",
            ) from error
        try:
            after = evaluator.score(suite, candidate, label=f"{suite.name}, candidate")
        except Exception as error:  # a bad candidate is rejected, it does not end the updater
            if isinstance(error, GateError):
                raise
            failed = Check("scores", False, f"the candidate failed on suite {suite.name}: {error!r}"[:300])
            return Findings((), None), [failed], []
        worst = evaluator.regressions(suite, before, after)
        chance, clusters = evaluator.chance(suite), suite.clusters()
        asked = used.get(suite.name, 0)
        scores.append(Scores(suite, base, before, after, chance, worst, clusters, released, rival, asked))
    levels = {"level": look.level, "loss_level": look.loss_level}
    levels |= {"margin": settings.margin, "mean_margin": settings.mean_margin}
    findings = decide(scores, **levels, min_items=settings.min_items)
    findings = replace(findings, trust=judge_sources(scores, evaluator.chance, settings, candidate))
    return findings, evaluator.answer_checks(candidate, suites), scores


def diagnose(
    evaluator: Evaluator[M],
    scores: Sequence[Scores],
    incumbent: str | None,
    candidate: str,
    counts: ConceptCounts | None,
) -> Diagnostics:
    """Compute diagnostics; failures become warnings, as does a share of "yes" that moves away from the truth.
    ``scores`` is empty if the candidate could not be scored."""
    found, warnings = Diagnostics(), []
    try:
        found = evaluator.diagnostics(scores, incumbent, candidate) if scores else found
    except (RatchetError, RuntimeError, ValueError) as error:
        warnings.append(f"features and answers could not be compared: {error}")
    try:
        found = replace(found, tail=measure_tail(scores, counts) if scores and counts else None)
    except RatchetError as error:
        warnings.append(f"results are not split by how often concepts were seen: {error.message}")
    moved_away = [
        f'{name}: "yes" is {share.after:.0%} of the answers, before {share.before:.0%}; it is right for '
        f"{share.truth:.0%} (a warning from {YES_BOUND:.0%} further away)"
        for name, share in found.yes.items()
        if share.moved_away > YES_BOUND
    ]
    unbounded = [
        f"{kind}: probabilities of a match may be wrong by {curve.ci_high:.1%} on average, and {MOST_ERROR:.0%} is "
        "allowed: searches with min_probability are refused"
        for kind, curve in found.calibration.items()
        if not curve.bounded
    ]
    return replace(found, warnings=(*moved_away, *unbounded, *warnings))
