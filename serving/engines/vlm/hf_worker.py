"""The thread in which transformers answers: waiting requests of one model become one batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from serving.engines.vlm.hf_batch import Row, Scoring, answer, score
from serving.errors import EngineDead

_RESTART = "Start a new engine."


class Worker:
    """Takes rows and scorings in order; ends at the first error that is not of one request's making."""

    def __init__(self, processor: Any, ends: frozenset[int], batch: int, threads: int) -> None:
        """``ends``: tokens that end an answer; ``batch``: most rows at once; ``threads``: of torch on the CPU."""
        self._processor = processor
        self._ends = ends
        self._batch = batch
        self._threads = threads
        self._waiting: deque[tuple[nn.Module, Row | Scoring]] = deque()
        self._ready = threading.Condition()
        self.trouble = ""
        self._thread = threading.Thread(target=self._run, name="vlm-answers", daemon=True)
        self._thread.start()

    def put(self, model: nn.Module, work: Row | Scoring) -> None:
        """Queue work. Raises :class:`EngineDead` when the thread has ended."""
        with self._ready:
            if self.trouble:
                raise EngineDead(self.trouble, _RESTART)
            self._waiting.append((model, work))
            self._ready.notify()

    def stop(self, why: str) -> None:
        """End the thread after the token it is at; what waits fails with ``why``."""
        with self._ready:
            self.trouble = self.trouble or why
            self._ready.notify()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        now: Sequence[Row | Scoring] = ()
        try:
            while True:
                with self._ready:
                    self._ready.wait_for(lambda: self._waiting or self.trouble)
                    if self.trouble:
                        break
                    model, now = self._take()
                self._do(model, now)
        except Exception as error:
            self.stop(f"transformers could not answer: {error!r}")
        with self._ready:
            left = [*now, *(work for _, work in self._waiting)]
            self._waiting.clear()
        for work in left:
            work.fail(EngineDead(self.trouble, _RESTART))

    def _take(self) -> tuple[nn.Module, Sequence[Row | Scoring]]:
        """The oldest work, and with a row as many more rows of its model as fit into the batch."""
        model, first = self._waiting.popleft()
        if isinstance(first, Scoring):
            return model, [first]
        rows: list[Row | Scoring] = [first]
        others: deque[tuple[nn.Module, Row | Scoring]] = deque()
        for other, work in self._waiting:
            if other is model and isinstance(work, Row) and len(rows) < self._batch:
                rows.append(work)
            else:
                others.append((other, work))
        self._waiting = others
        return model, rows

    def _do(self, model: nn.Module, work: Sequence[Row | Scoring]) -> None:
        rows = [one for one in work if isinstance(one, Row) and not one.aborted]
        if rows:
            answer(model, self._processor, rows, self._ends, lambda: bool(self.trouble))
        for one in work:
            if isinstance(one, Scoring):
                parts = [one.choices[i : i + self._batch] for i in range(0, len(one.choices), self._batch)]
                one.tell([value for part in parts for value in score(model, self._processor, one.request, part)])
