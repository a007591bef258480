"""The gate's engine: opened for one gate run, and closed after it whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from core.errors import GateError
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead
from updater.gate.clip import AcrossBasesEvaluator, ClipEvaluator
from updater.gate.evaluator import Evaluator
from updater.gate.vlm import VlmEvaluator


@contextmanager
def open_evaluator(settings: Settings, base: ClipBase | VlmBase) -> Iterator[Evaluator[Any]]:
    """An engine of `base`, as it serves: a CLIP in this process, a VLM in the engine that the settings name.

    Raises:
        GateError: the VLM engine does not start.
    """
    if isinstance(base, ClipBase):
        yield ClipEvaluator(ClipEngine.of(settings, base, threads=settings.updater.threads))
        return
    from serving.engines.vlm.open import open_engine
    from serving.engines.vlm.sync import SyncVlm

    engine = open_engine(base, settings.serve)
    with ExitStack() as stack:
        try:
            vlm = stack.enter_context(SyncVlm(engine))
        except EngineDead as error:
            raise GateError(f"the VLM engine does not start: {error.message}", error.fix) from error
        yield VlmEvaluator(vlm, engine, settings.serve, cache=settings.home / "cache" / "gate")


@contextmanager
def open_across_bases(settings: Settings, old: ClipBase, new: ClipBase, candidate: str) -> Iterator[Evaluator[Any]]:
    """Two engines of this process, one for each base; see :class:`AcrossBasesEvaluator`."""
    engines = [ClipEngine.of(settings, base, threads=settings.updater.threads) for base in (old, new)]
    yield AcrossBasesEvaluator(engines[0], engines[1], candidate)
