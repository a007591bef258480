"""``python -m benchmarks.continual.worker ASSIGNMENT``: run one unit.

Exits with 0 when it is done or was stopped, and with 1 and the reason in ``failed.json`` when it failed.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter

from benchmarks.continual.chain import Chain, Unit
from benchmarks.continual.evaluation import Evaluator
from benchmarks.continual.exam import CACHE, ClipExam, TrialExam
from benchmarks.continual.own_data import OwnData, own_stream
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.question_exam import QuestionExam, asking
from benchmarks.continual.questions import load_questions
from benchmarks.continual.stream import Stream, load_stream
from core.errors import RatchetError
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.vlm.vlm_base import load_vlm_base
from updater.service.process import StopSignal
from updater.training.checkpoint import write_json
from updater.training.workers import Stopped

FAILED = "failed.json"


@dataclass(frozen=True)
class Assignment:
    """A unit, and everything that its process needs."""

    home: Path
    base: str
    results: Path
    unit: Unit
    updates: int
    protocol: Protocol
    data: OwnData | None = None
    """In place of the benchmark's own stream of a CLIP."""


ASSIGNMENTS: Final = TypeAdapter(Assignment)


def work(task: Assignment, stop: StopSignal) -> int:
    """Run the unit and return the exit status."""
    unit, results = task.unit, task.results
    failed = unit.folder(results) / FAILED
    failed.unlink(missing_ok=True)
    try:
        with ExitStack() as stack:
            if unit.recipe.family == "vlm":
                vlm_base = load_vlm_base(task.home, task.base)
                vlm = stack.enter_context(asking(vlm_base))
                questions = load_questions(task.home, task.protocol)
                if unit.trial is not None:
                    questions = questions.for_tuning()
                exam = QuestionExam(vlm, questions, results, 0 if unit.trial is None else task.updates)
                chain = Chain(vlm_base, questions, task.protocol, unit.recipe, unit, results, exam)
            else:
                stream = (
                    load_stream(task.home, task.protocol)
                    if task.data is None
                    else own_stream(task.home, task.data, task.protocol)
                )
                base = load_base(task.home, task.base)
                make = clip_chain if unit.trial is None else partial(trial_chain, updates=task.updates)
                chain = make(base, stream, task.protocol, unit, results)
            with stop.training():
                chain.run(task.updates, stop)
    except Stopped:
        return 0
    except Exception as error:
        reason = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"
        write_json(failed, {"reason": reason, "trace": traceback.format_exc()})
        return 1
    return 0


def clip_chain(base: ClipBase, stream: Stream, protocol: Protocol, unit: Unit, results: Path) -> Chain:
    """A chain of a CLIP. Raises BudgetError."""
    exam = ClipExam(Evaluator(base, stream.suites, results / CACHE), stream, results, unit.folder(results))
    return Chain(base, stream, protocol, unit.recipe, unit, results, exam)


def trial_chain(base: ClipBase, stream: Stream, protocol: Protocol, unit: Unit, results: Path, updates: int) -> Chain:
    """A chain on the tuning pairs, which is scored after its last update alone. Raises BudgetError."""
    stream = stream.for_tuning()
    evaluator = Evaluator(base, stream.suites, results / CACHE)
    exam = TrialExam(evaluator, stream, results, unit.folder(results), updates)
    return Chain(base, stream, protocol, unit.recipe, unit, results, exam)


def main(arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    stop = StopSignal()
    stop.install()
    return work(ASSIGNMENTS.validate_json(arguments[0]), stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
