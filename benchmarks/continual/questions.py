"""Training data and questions of the VLM stream.

Four updates over pictures that the shipped VLM has not seen: clothes, handwritten digits, tiles of a game, icons. Each
asks what a picture shows, and whether it shows a thing, with the same words for two pictures, so that the words reveal
nothing. Three classes of clothes and of digits are in no update, and have suites of their own. Held out are the base's
own questions, by their kind, and questions about drawings of domains that the base's questions, which an update may
rehearse, do not have. No picture of a suite looks like a training picture; suites of tiles and icons show other things
than those.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from benchmarks.continual.looks import left_out
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import LEAST_TUNING, TUNING, TUNING_SHARE, Role, by_hash, unseen_classes
from core.digests import digest_json, share_of
from core.progress import step
from demo.data import prepare_domain, prepare_questions
from demo.data.questions import ASK_GARMENT, SYNONYMS
from demo.data.questions_pictures import basic_name
from demo.data.questions_words import ASK_CATEGORY, ASK_NAME, with_article
from demo.vlm.shipped import TRAINED_ON
from streams.publish.folders import FolderItem, read_folder
from updater.data.pools import Pair, Question

PROTOCOL: Final = Protocol(gflops=480.0, batch_size=48, new=480, reference=480, replay=480, items=240)
KINDS: Final = ("name", "category", "colour", "presence")
"""Of the base's questions; each is a suite."""


@dataclass(frozen=True)
class Source:
    """A demo domain, and how it is asked about."""

    name: str
    domain: str
    asks: tuple[str, ...]
    wider: float = 0.0
    """Share of its concepts that its suite asks about, in addition to those of its test split."""
    titled: bool = False
    """The answer is the beginning of a picture's text; else its label."""
    shared: bool = False
    """Its classes, but :data:`benchmarks.continual.stream.UNSEEN_CLASSES` of them, are in its update."""

    def answer(self, item: FolderItem) -> str:
        """Subject of a picture; empty if ambiguous."""
        return basic_name(item.text, "") if self.titled else item.label

    def tests(self, item: FolderItem) -> bool:
        return item.split == "test" or share_of(f"suite:{item.concept}") < self.wider

    def tunes(self, item: FolderItem) -> bool:
        """True if a suite for tuning may ask about it, where no other one does."""
        return share_of(f"{TUNING}:{item.path.name if self.shared else item.concept}") < TUNING_SHARE


UPDATES: Final = (
    Source("clothes", "fashion", ASK_GARMENT, shared=True),
    Source("digits", "digits", ("which digit is this?", "what number is written here?"), shared=True),
    Source("tiles", "pixel_mshock", ASK_CATEGORY),
    Source("icons", "game_icons", ASK_NAME, wider=0.2, titled=True),
)
OUTSIDE: Final = (
    Source("emoji_3d", "fluent3d", ASK_NAME, titled=True),
    Source("stamp_drawings", "stamp_draw", ASK_NAME, wider=1.0, titled=True),
)
"""Held-out domains that neither an update nor the base's questions have."""


@dataclass(frozen=True)
class Asked:
    """A question with all correct answers."""

    question: Question
    answers: tuple[str, ...]

    @property
    def id(self) -> str:
        return self.question.id

    @property
    def metric(self) -> str:
        """Its grading, see :func:`updater.gate.suite_items.grade`."""
        return "yes_no" if self.answers[0] in ("yes", "no") else "exact_match"


@dataclass(frozen=True)
class QuestionSuite:
    name: str
    role: Role
    items: tuple[Asked, ...]
    outside: bool = False
    """Of a domain that the base's own questions do not have."""


@dataclass(frozen=True)
class QuestionStream:
    """Training data (:class:`benchmarks.continual.plan.Lessons`) and suites of a chain."""

    updates: Mapping[str, tuple[Question, ...]]
    reference: tuple[Question, ...]
    suites: tuple[QuestionSuite, ...]
    tuning_updates: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)
    """About other pictures of the same domains; of a domain that has few others, its update's."""
    tuning: tuple[QuestionSuite, ...] = ()
    """Questions that are in no suite and in no update, by which a method's rate and weight are chosen."""

    def for_tuning(self) -> QuestionStream:
        return replace(self, updates=self.tuning_updates, suites=self.tuning)

    @property
    def digest(self) -> str:
        """Over all questions and answers, 64 hex digits."""
        learned = {name: [each.content for each in own] for name, own in {**self.updates, "": self.reference}.items()}
        suites = {suite.name: [[each.question.content, *each.answers] for each in suite.items] for suite in self.suites}
        return digest_json([list(learned.items()), list(suites.items())])


def prepare(home: Path) -> None:
    """Download and draw what is missing. Raises PackageError."""
    for source in (*UPDATES, *OUTSIDE):
        with step(f"data: {source.domain}"):
            prepare_domain(source.domain, home)
    with step(f"data: {TRAINED_ON}"):
        prepare_questions(TRAINED_ON, home)


def load_questions(home: Path, protocol: Protocol) -> QuestionStream:
    """Read what :func:`prepare` made."""
    updates: dict[str, list[Asked]] = {}
    tuning_updates: dict[str, list[Asked]] = {}
    suites: dict[str, tuple[Role, list[Asked]]] = {}
    for source in UPDATES:
        items = read_folder(home / "data" / source.domain)
        unseen = unseen_classes(items) if source.shared else frozenset()
        plain = [item for item in items if item.label not in unseen]
        rest = [item for item in plain if not source.tests(item)]
        training = [item for item in rest if not source.tunes(item)]
        updates[source.name] = about(source, training, protocol.new)
        learned = {each.id for each in updates[source.name]}
        others = about(source, [item for item in training if _name(item) not in learned], protocol.new)
        tuning_updates[source.name] = others if len(others) >= LEAST_TUNING else updates[source.name]
        suites[source.name] = "adaptation", about(source, [i for i in plain if source.tests(i)], protocol.items)
        suites[f"{TUNING} {source.name}"] = (
            "adaptation", about(source, [i for i in rest if source.tunes(i)], protocol.items)
        )  # fmt: skip
        if unseen:
            strangers = [item for item in items if item.label in unseen and source.tests(item)]
            suites[f"{source.name}_unseen"] = "unseen", about(source, strangers, protocol.items)
    for source in OUTSIDE:
        items = [item for item in read_folder(home / "data" / source.domain) if source.tests(item)]
        suites[source.name] = "held-out", about(source, items, protocol.items)
    base = read_folder(home / "data" / TRAINED_ON)
    taught = [_picture(each) for part in (updates, tuning_updates) for own in part.values() for each in own]
    candidates = {name: [_picture(each) for each in questions] for name, (_, questions) in suites.items()}
    alike = left_out(home / "bench" / "continual" / "looks", taught, candidates)
    own = {kind: by_hash(_tests(base, kind), 2 * protocol.items) for kind in KINDS}

    def of(tuning: bool) -> tuple[QuestionSuite, ...]:
        prefix, outside = f"{TUNING} ", {source.name for source in OUTSIDE}
        part = slice(protocol.items, None) if tuning else slice(protocol.items)
        return (
            *(
                QuestionSuite(
                    name.removeprefix(prefix), role, tuple(e for e in asked if e.id not in alike[name]), name in outside
                )
                for name, (role, asked) in suites.items()
                if name.startswith(prefix) == tuning
            ),
            *(QuestionSuite(kind, "held-out", questions[part]) for kind, questions in own.items()),
        )

    return QuestionStream(
        {name: tuple(each.question for each in own) for name, own in updates.items()},
        by_hash((_own(item).question for item in base if item.split == "train"), protocol.reference),
        of(tuning=False),
        {name: tuple(each.question for each in own) for name, own in tuning_updates.items()},
        tuple(suite for suite in of(tuning=True) if len(suite.items) >= LEAST_TUNING),
    )


def about(source: Source, items: Sequence[FolderItem], limit: int) -> list[Asked]:
    """At most ``limit`` questions about pictures: half of them open ones, half yes/no pairs."""
    dice = random.Random(f"{source.name} {limit}")  # noqa: S311
    pictures = [item for item in sorted(items, key=lambda item: item.path.name) if source.answer(item)]
    dice.shuffle(pictures)
    named, shown = pictures[: limit // 2], pictures[limit // 2 : limit]
    questions = [
        _asked(source, item, dice.choice(source.asks), (source.answer(item), *_others(source.answer(item))))
        for item in named
    ]
    waiting: dict[str, FolderItem] = {}
    for item in shown:
        answer = source.answer(item)
        other = next((name for name in waiting if name != answer), "")
        if not other:
            waiting[answer] = item
            continue
        partner = waiting.pop(other)
        text = f"is this {with_article(answer)}?"
        questions += [_asked(source, item, text, ("yes",)), _asked(source, partner, text, ("no",))]
    return questions


def _others(answer: str) -> tuple[str, ...]:
    return (SYNONYMS[answer],) if answer in SYNONYMS else ()


def _asked(source: Source, item: FolderItem, text: str, answers: tuple[str, ...]) -> Asked:
    return Asked(Question(_name(item), text, answers[0], item.bytes, source.answer(item), source.name), answers)


def _tests(base: Sequence[FolderItem], kind: str) -> list[Asked]:
    return [_own(item) for item in base if item.split == "test" and item.label == kind]


def _own(item: FolderItem) -> Asked:
    name = f"{_name(item)} {item.question}"
    return Asked(Question(name, item.question, item.answer, item.bytes, item.label), item.answers or (item.answer,))


def _name(item: FolderItem) -> str:
    return f"{item.domain}/{item.path.name}"


def _picture(asked: Asked) -> Pair:
    return Pair(asked.id, "", asked.question.read)
