"""The VLM part of the demo: questions about a new kind of image arrive, and are learned."""

from __future__ import annotations

from dataclasses import dataclass

from core.progress import progress_log, track
from core.settings import Settings
from demo.story.stage import Stage
from demo.story.summary import Lesson
from streams.publish.folders import FolderItem, read_folder

DOMAIN = "vqa_fashion"
ASKED = 120  # held-out questions asked before and after
BETTER, WORSE = 8, 4  # answers on the page: that became right, and that became wrong


@dataclass(frozen=True)
class Answered:
    item: FolderItem
    before: str
    after: str

    def right(self, answer: str) -> bool:
        return answer.strip().lower() in {each.lower() for each in (self.item.answers or (self.item.answer,))}

    @property
    def change(self) -> int:
        """1: became right, -1: became wrong, 0: neither."""
        return int(self.right(self.after)) - int(self.right(self.before))


def held_out(settings: Settings, domain: str, count: int) -> list[FolderItem]:
    """Held-out questions of a prepared domain, evenly spread."""
    items = [item for item in read_folder(settings.home / "data" / domain, split="test") if item.question]
    return items[:: max(1, len(items) // count)][:count]


@dataclass(frozen=True)
class AnswerComparison:
    title: str
    answers: tuple[Answered, ...]


def stream(stage: Stage) -> None:
    stage.stream(DOMAIN)
    counts = [stage.store.count(split=split, having="question") for split in ("train", "fresh_eval")]
    progress_log.info(f"{counts[0]} questions to train on, {counts[1]} kept for the gate")


def learn(stage: Stage) -> tuple[Lesson, AnswerComparison]:
    """Train both updates, release the one that passes, compare it with the base, and roll it back and forward."""
    screen = stage.screen
    with screen.chapter("vlm-naive"):
        naive = stage.learn("vlm-naive")
    with screen.chapter("vlm-default"):
        default = stage.learn("vlm-default")
        swap = stage.await_release("vlm", default)
        comparison = _compare(stage)
    probe = held_out(stage.settings, DOMAIN, 1)[0]

    def answers(number: int) -> bool:
        return bool(stage.client.vqa(probe.bytes(), probe.question, model=f"vlm@{number}")["answer"])

    with screen.chapter("vlm-rollback"):
        rollback_seconds = stage.back_and_forth("vlm", default.adapter, answers)
    return stage.lesson(naive, default, swap, rollback_seconds), comparison


def _compare(stage: Stage) -> AnswerComparison:
    live = stage.client.live()
    answered = []
    for item in track(held_out(stage.settings, DOMAIN, ASKED), "asking before and after"):
        before, after = (
            str(stage.client.vqa(item.bytes(), item.question, model=f"vlm@{number}")["answer"])
            for number in (live - 1, live)
        )
        answered.append(Answered(item, before, after))
    right = [sum(each.right(answer) for each, answer in pairs) for pairs in (
        [(each, each.before) for each in answered], [(each, each.after) for each in answered],
    )]  # fmt: skip
    title = (
        f"{len(answered)} held-out questions: right {right[0]} → {right[1]} times. "
        f"Shown: {BETTER} answers that became right and {WORSE} that became wrong (fewer if there are fewer)."
    )
    progress_log.info(title)
    shown = [each for each in answered if each.change > 0][:BETTER] + [each for each in answered if each.change < 0][
        :WORSE
    ]
    return AnswerComparison(title, tuple(shown))
