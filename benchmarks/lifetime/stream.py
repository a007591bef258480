"""A stream of updates with a known truth: data arrive, candidates are trained and judged, those that pass are
released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.lifetime.audits import audit, truly_lost
from benchmarks.lifetime.evaluation import (
    RankedSuite,
    Sample,
    findings_of,
    fresh_of,
    item_name,
    memory_of,
    samples_of,
    static_suites,
)
from benchmarks.lifetime.moves import Generator
from benchmarks.lifetime.schedule import Schedule
from benchmarks.lifetime.world import FORGOTTEN, ITEMS, Model, World
from core.ledger import VerdictRow
from core.settings.updates import Gate
from updater.gate.decision import conclude
from updater.gate.interim_analyses import InterimAnalysis
from updater.gate.sample_suites import best_releases
from updater.gate.suite_items import Seal
from updater.service.release_audit import SAMPLES

TRIGGERS = 12
"""Triggers after which the stream moves to the next lesson."""
FRESH = 64
"""Held-out samples of a trigger: 256 to train on at the default share of 20%."""
GAIN3 = 0.03
OTHER_GAINS = (0.01, 0.02, 0.05, 0.1)
HARMFUL = 0.1
"""Share of candidates that lose more than the margin of a suite, by up to HARM."""
HARM = 0.02
SEAL = Seal(b"lifetime")


@dataclass(frozen=True, slots=True)
class Rules:
    """The gate's rules; with everything on, the current ones."""

    name: str = "as it is"
    memory: bool = True
    best: bool = True
    ranks: bool = True
    waiting: bool = True
    """Looks as in :class:`Schedule`."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """The data of the stream for one update."""

    domain: str
    gain: float
    """True gain of a candidate that learned it."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A lesson's end."""

    lesson: Lesson
    triggers: int
    """Until the release; TRIGGERS without one."""
    released: bool
    looks: int
    outcomes: tuple[str, ...]


@dataclass(slots=True)
class Course:
    """The results of a stream."""

    lessons: list[Ended] = field(default_factory=list)
    harmful: int = 0
    """Candidates that truly lose more than a margin, of a suite or of the mean, and were judged."""
    harmful_released: int = 0
    audits: int = 0
    audits_failed: int = 0
    audits_failed_wrongly: int = 0
    """Nothing had truly lost more than a margin."""
    best: dict[str, float] = field(default_factory=dict)
    """By domain the most that a release was truly above the base."""
    end: dict[str, float] = field(default_factory=dict)
    alpha: list[float] = field(default_factory=list)
    """Spent before each release, and at the end."""

    @property
    def retained(self) -> float:
        """Share of the points above the base that the last release still has; NaN when nothing was learned."""
        most = sum(self.best.values())
        return sum(self.end[name] for name in self.best) / most if most > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class _Release:
    verdict: VerdictRow
    model: Model
    samples: list[Sample]
    gains: dict[str, float]
    """True gains that it learned, by domain."""


@dataclass(slots=True)
class _Live:
    base: Model
    releases: list[_Release] = field(default_factory=list)
    """The newest last; those that an audit took back are left out."""
    audited: int = 0
    """Number of them that the last audit that passed covers."""

    @property
    def model(self) -> Model:
        return self.releases[-1].model if self.releases else self.base

    @property
    def name(self) -> str | None:
        return self.releases[-1].verdict.adapter if self.releases else None

    @property
    def verdicts(self) -> list[VerdictRow]:
        """The newest first."""
        return [release.verdict for release in reversed(self.releases)]

    def named(self, name: str) -> Model:
        return next(release.model for release in self.releases if release.verdict.adapter == name)


def lessons_of(world: World, count: int, gains: Sequence[float], rng: Generator) -> list[Lesson]:
    """Domains in shuffled rounds, every second lesson with the first gain, the others with the rest in turn."""
    names = [domain.name for domain in world.streamed]
    order = [name for _ in range(-(-count // len(names))) for name in rng.permutation(names)]
    others = gains[1:] or gains
    given = [gains[0] if number % 2 == 0 else others[number // 2 % len(others)] for number in range(count)]
    return [Lesson(str(name), gain) for name, gain in zip(order, given, strict=False)]


class Stream:
    """One updater in one world."""

    def __init__(
        self, world: World, rules: Rules, settings: Gate, rng: Generator, forgotten: float = FORGOTTEN
    ) -> None:
        self.world, self.rules, self.settings, self.rng, self.forgotten = world, rules, settings, rng, forgotten
        self.live = _Live(world.base)
        self.schedule = Schedule(settings, rules.waiting)
        self.course = Course()
        self._static = static_suites(world, "judged", SEAL)
        self._order = {domain.name: rng.permutation(ITEMS) for domain in world.streamed}
        self._arrived = dict.fromkeys(self._order, 0)
        self._fresh: list[Sample] = []
        self._sealed: list[Sample] = []
        """Sealed samples since the last audit; then they join the others."""
        self._opened: list[Sample] = []
        self._since_audit = 0
        self._memory: list[RankedSuite] = []
        self._pending: dict[str, float] = {}

    def run(self, lessons: Sequence[Lesson]) -> Course:
        for lesson in lessons:
            self.course.lessons.append(self._learn(lesson))
        self.course.alpha = [*self.schedule.history, self.schedule.spent]
        self.course.end = {d.name: self.world.learned(d, self.live.model) for d in self.world.streamed}
        return self.course

    def _learn(self, lesson: Lesson) -> Ended:
        """Triggers until a release or until the next lesson: what was not learned stays pending."""
        self._pending[lesson.domain] = lesson.gain
        candidate: Model | None = None
        outcomes: list[str] = []
        for trigger in range(1, TRIGGERS + 1):
            self._arrive(lesson.domain)
            look = self.schedule.triggered(len(self._fresh))
            if look is None:
                continue
            if candidate is None or look.number == 1:
                candidate = self._candidate()
            verdict, tested = self._judge(candidate, look)
            outcomes.append(verdict.outcome)
            self.schedule.looked(look, verdict, tested=tested)
            if verdict.outcome == "passed":
                self._release(candidate, verdict)
                return Ended(lesson, trigger, True, len(outcomes), tuple(outcomes))
        self.schedule.due = None
        return Ended(lesson, TRIGGERS, False, len(outcomes), tuple(outcomes))

    def _arrive(self, domain: str) -> None:
        first = self._arrived[domain]
        self._arrived[domain] += FRESH
        arrived = [(domain, int(self._order[domain][i % ITEMS])) for i in range(first, first + FRESH)]
        self._sealed += [sample for sample in arrived if SEAL.holds(item_name(sample))]
        self._fresh += [sample for sample in arrived if not SEAL.holds(item_name(sample))]

    def _candidate(self) -> Model:
        harm: dict[str, float] = {}
        if self.rng.random() < HARMFUL:
            victim = self.world.static[self.rng.integers(len(self.world.static))]
            harm[victim.name] = (victim.suite.margin or self.settings.margin) + self.rng.uniform(0.0, HARM)
        candidate = self.world.candidate(self.live.model, self._pending, harm, self.forgotten, self.rng)
        self.course.harmful += self._is_harmful(candidate)
        return candidate

    def _is_harmful(self, model: Model) -> bool:
        """True if a static suite, or their mean, is truly below incumbent or base by more than its margin."""
        references = (self.live.model, self.world.base)
        return any(truly_lost(self._static, self.world, each, model, self.settings) for each in references)

    def _judge(self, candidate: Model, look: InterimAnalysis) -> tuple[VerdictRow, bool]:
        suites = [*self._static, *(self._memory if self.rules.memory else ()), *fresh_of(self._fresh, self.settings)]
        findings = findings_of(
            suites, self.world.base, self.live.model, candidate, self._best(), look,
            self.settings, ranked=self.rules.ranks,
        )  # fmt: skip
        outcome, _ = conclude(findings, ())
        summary = {
            "suites": {r.name: {"after": r.after, "base": r.base, "units": r.units} for r in findings.results},
            "gain": findings.gain.summary() if findings.gain else None,
        }
        name = f"clip-{len(self.schedule.verdicts):012d}"
        return VerdictRow(
            id=0, update_id=name, adapter=name, outcome=outcome, report_key="", summary=summary
        ), findings.tested

    def _best(self) -> Mapping[str, tuple[str, Model]]:
        if not self.rules.best:
            return {}
        fixed, learned = ([each.suite.name for each in suites] for suites in (self._static, self._memory))
        best = best_releases(self.live.verdicts, fixed, learned, self.live.name)
        return {suite: (name, self.live.named(name)) for suite, name in best.items()}

    def _release(self, candidate: Model, verdict: VerdictRow) -> None:
        self.course.harmful_released += self._is_harmful(candidate)
        self.live.releases.append(_Release(verdict, candidate, self._fresh, self._pending))
        self._fresh, self._pending = [], {}
        for domain in self.world.streamed:
            above = self.world.learned(domain, candidate)
            self.course.best[domain.name] = max(self.course.best.get(domain.name, 0.0), above)
        self._since_audit += 1
        if self._since_audit == self.settings.audit_every:
            self._audit()
        learned = [*self._opened, *(sample for release in self.live.releases for sample in release.samples)]
        self._memory = memory_of(learned, self.settings) if self.rules.memory else []

    def _audit(self) -> None:
        """Audit the live release; one that fails is taken back, and what was learned since is pending again."""
        live, suites = self.live, [*static_suites(self.world, "sealed", SEAL), *samples_of(self._sealed, SAMPLES)]
        last = live.releases[live.audited - 1].model if live.audited else None
        audited = audit(suites, self.world, last, live.model, self.settings)
        self.course.audits += 1
        self.course.audits_failed += not audited.passed
        self.course.audits_failed_wrongly += audited.wrong
        if audited.passed:
            live.audited = len(live.releases)
            self._opened += self._sealed
        else:
            taken_back = live.releases[live.audited :]
            del live.releases[live.audited :]
            self._fresh = [*self._sealed, *(sample for release in taken_back for sample in release.samples)]
            gains = [item for release in taken_back for item in release.gains.items()]
            self._pending = {domain: sum(gain for name, gain in gains if name == domain) for domain, _ in gains}
        self._sealed, self._since_audit = [], 0
