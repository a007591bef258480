"""A stream of updates with a known truth: data arrive, candidates are trained and judged, those that pass are
released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.lifetime.evaluation import RankedSuite, Sample, findings_of, fresh_of, memory_of, static_suites
from benchmarks.lifetime.moves import Generator
from benchmarks.lifetime.schedule import Schedule
from benchmarks.lifetime.world import FORGOTTEN, ITEMS, Model, World
from core.ledger import VerdictRow
from core.settings.updates import Gate
from updater.gate.decision import conclude
from updater.gate.interim_analyses import InterimAnalysis
from updater.gate.sample_suites import best_by_suite

TRIGGERS = 12
"""Triggers after which the stream moves to the next lesson."""
FRESH = 45
"""Held-out samples of a trigger: 256 to train on at the default share of 15%."""
GAIN3 = 0.03
OTHER_GAINS = (0.01, 0.02, 0.05, 0.1)
HARMFUL = 0.1
"""Share of candidates that lose more than the margin somewhere, by up to HARM."""
HARM = 0.02


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
    """Candidates that truly lose more than a margin and were judged."""
    harmful_released: int = 0
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


@dataclass(slots=True)
class _Live:
    model: Model
    name: str = ""
    released: dict[str, Model] = field(default_factory=dict)
    verdicts: list[VerdictRow] = field(default_factory=list)


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
        self._static = static_suites(world)
        self._order = {domain.name: rng.permutation(ITEMS) for domain in world.streamed}
        self._arrived = dict.fromkeys(self._order, 0)
        self._fresh: list[Sample] = []
        self._learned: list[Sample] = []
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
        self._fresh += [(domain, int(self._order[domain][i % ITEMS])) for i in range(first, first + FRESH)]

    def _candidate(self) -> Model:
        harm: dict[str, float] = {}
        if self.rng.random() < HARMFUL:
            victim = self.world.static[self.rng.integers(len(self.world.static))]
            harm[victim.name] = (victim.suite.margin or self.settings.margin) + self.rng.uniform(0.0, HARM)
        candidate = self.world.candidate(self.live.model, self._pending, harm, self.forgotten, self.rng)
        self.course.harmful += self._is_harmful(candidate)
        return candidate

    def _is_harmful(self, model: Model) -> bool:
        """True if a static suite is truly below incumbent or base by more than its margin."""
        return any(
            max(domain.score(self.live.model), domain.score(self.world.base)) - domain.score(model)
            > (domain.suite.margin or self.settings.margin)
            for domain in self.world.static
        )

    def _judge(self, candidate: Model, look: InterimAnalysis) -> tuple[VerdictRow, bool]:
        suites = [*self._static, *(self._memory if self.rules.memory else ()), *fresh_of(self._fresh, self.settings)]
        findings = findings_of(
            suites, self.world.base, self.live.model, candidate, self._best(suites), look,
            self.settings, ranked=self.rules.ranks,
        )  # fmt: skip
        outcome, _ = conclude(findings, ())
        summary = {
            "suites": {result.name: {"after": result.after, "base": result.base} for result in findings.results},
            "gain": findings.gain.summary() if findings.gain else None,
        }
        name = f"clip-{len(self.schedule.verdicts):012d}"
        return VerdictRow(
            id=0, update_id=name, adapter=name, outcome=outcome, report_key="", summary=summary
        ), findings.tested

    def _best(self, suites: Sequence[RankedSuite]) -> Mapping[str, tuple[str, Model]]:
        if not self.rules.best:
            return {}
        names = [each.suite.name for each in suites if each.suite.role == "retention"]
        best = best_by_suite(self.live.verdicts, names, self.live.name or None)
        return {suite: (name, self.live.released[name]) for suite, name in best.items()}

    def _release(self, candidate: Model, verdict: VerdictRow) -> None:
        self.course.harmful_released += self._is_harmful(candidate)
        self.live.verdicts.insert(0, verdict)
        self.live.released[verdict.adapter] = candidate
        self.live.model, self.live.name = candidate, verdict.adapter
        self._learned += self._fresh
        self._fresh, self._pending = [], {}
        self._memory = memory_of(self._learned, self.settings) if self.rules.memory else []
        for domain in self.world.streamed:
            above = self.world.learned(domain, candidate)
            self.course.best[domain.name] = max(self.course.best.get(domain.name, 0.0), above)
