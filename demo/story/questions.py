"""The VLM part of the demo: questions about a new kind of image arrive, and are learned."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from core.progress import say, track
from core.settings import Settings
from demo.story.stage import Stage
from demo.story.summary import Lesson
from streams.publish.folders import FolderItem, read_folder

DOMAIN = "vqa_fashion"
ASKED = 120  # held-out questions that are asked before and after
BETTER, WORSE = 8, 4  # answers in the picture: that became right, and that became wrong


@dataclass(frozen=True)
class Answered:
    """One question with its answer before and after the update."""

    item: FolderItem
    before: str
    after: str

    def right(self, answer: str) -> bool:
        """Whether it is one of the reference answers."""
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
    """The answers that changed, of all that were asked for before and after the update."""

    title: str
    answers: tuple[Answered, ...]


def stream(stage: Stage) -> None:
    """Bring the questions."""
    stage.stream(DOMAIN)
    counts = [stage.store.count(split=split, having="question") for split in ("train", "fresh_eval")]
    say(f"{counts[0]} questions to train on, {counts[1]} kept for the gate")


def learn(stage: Stage) -> tuple[Lesson, AnswerComparison]:
    """Train both updates, release the one that passes, compare it with the base, and take it back and forward."""
    screen = stage.screen
    with screen.chapter("vlm-naive"):
        naive = stage.learn("vlm-naive")
    with screen.chapter("vlm-default"):
        default = stage.learn("vlm-default")
        swap = stage.await_release("vlm", default)
        comparison = _compare(stage)
        picture = draw(comparison.answers, comparison.title, stage.settings.home / "answers.png")
    probe = held_out(stage.settings, DOMAIN, 1)[0]

    def answers(number: int) -> bool:
        return bool(stage.client.vqa(probe.bytes(), probe.question, model=f"vlm@{number}")["answer"])

    with screen.chapter("vlm-rollback"):
        rollback_seconds = stage.back_and_forth("vlm", default.adapter, answers)
    return stage.lesson(naive, default, swap, rollback_seconds, picture), comparison


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
    say(title)
    shown = [each for each in answered if each.change > 0][:BETTER] + [each for each in answered if each.change < 0][
        :WORSE
    ]
    return AnswerComparison(title, tuple(shown))


def draw(answers: Sequence[Answered], title: str, path: Path, columns: int = 4) -> Path:
    """Draw images with question, reference answer, and the answers before and after (green: right, red: wrong)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = max(1, -(-len(answers) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.9 * rows + 0.6), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, each in zip(axes.flat, answers, strict=False):
        axis.imshow(Image.open(io.BytesIO(each.item.bytes())).convert("RGB"))
        axis.set_title(f"{each.item.question}\n({each.item.answer})", fontsize=9)
        for place, when, answer in ((-0.08, "before", each.before), (-0.2, "after", each.after)):
            colour = "#1a9641" if each.right(answer) else "#d7191c"
            axis.text(0.5, place, f"{when}: {answer[:40]}", color=colour, fontsize=9, ha="center",
                      transform=axis.transAxes)  # fmt: skip
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.subplots_adjust(
        left=0.02, right=0.98, bottom=0.09, top=1 - 1.1 / (2.9 * rows + 0.6), wspace=0.1, hspace=0.62
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path
