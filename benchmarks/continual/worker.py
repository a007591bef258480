"""``python -m benchmarks.continual.worker HOME BASE RESULTS METHOD ORDER SEED UPDATES TRIAL``: run one unit.

Exits with 0 when it is done or was stopped, and with 1 and the reason in ``failed.json`` when it failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.continual.chain import Chain, Unit
from benchmarks.continual.evaluation import Evaluator
from benchmarks.continual.exam import CACHE, ClipExam
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.question_exam import QuestionExam, asking
from benchmarks.continual.questions import QuestionStream, load_questions
from benchmarks.continual.stream import Stream, load_stream
from core.errors import RatchetError
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.vlm.open import SyncVlm
from serving.engines.vlm.vlm_base import VlmBase, load_vlm_base
from updater.service.process import StopSignal
from updater.training.checkpoint import write_json
from updater.training.workers import Stopped

FAILED = "failed.json"


def work(home: Path, base: str, results: Path, unit: Unit, updates: int, protocol: Protocol, stop: StopSignal) -> int:
    """Run the unit and return the exit status. A trial is scored on the tuning suites."""
    failed = unit.folder(results) / FAILED
    failed.unlink(missing_ok=True)
    try:
        with ExitStack() as stack:
            if unit.recipe.family == "vlm":
                vlm_base = load_vlm_base(home, base)
                vlm = stack.enter_context(asking(vlm_base))
                chain = question_chain(vlm_base, load_questions(home, protocol), protocol, unit, results, vlm)
            else:
                stream = load_stream(home, protocol)
                if unit.trial is not None:
                    stream = replace(stream, suites=stream.tuning)
                chain = clip_chain(load_base(home, base), stream, protocol, unit, results)
            with stop.training():
                chain.run(updates, stop)
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


def question_chain(
    base: VlmBase, stream: QuestionStream, protocol: Protocol, unit: Unit, results: Path, vlm: SyncVlm
) -> Chain:
    """A chain of a VLM, which answers through ``vlm``. Raises BudgetError, ConfigError."""
    return Chain(base, stream, protocol, unit.recipe, unit, results, QuestionExam(vlm, stream, results))


def main(arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)
    home, base, results, method, order, seed, updates, trial, protocol = arguments
    stop = StopSignal()
    stop.install()
    unit = Unit(method, int(order), int(seed), int(trial) if trial else None)
    return work(Path(home), base, Path(results), unit, int(updates), Protocol(**json.loads(protocol)), stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
