"""The thread in which transformers answers: waiting requests of one model become one batch.

When a batch fails, its halves go on where it was, down to a row alone; when that fails, one forward pass on a request
that is known to be good tells whose fault it is: the row's, which ends alone, or the engine's, which ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from serving.engines.vlm.generation import PROBE
from serving.engines.vlm.hf_batch import BatchRow, Scoring, answer, as_failure, score
from serving.errors import EngineDead

log = logging.getLogger("ratchet.vlm")
_RESTART = "Start a new engine."


class Worker:
    """Takes rows and scorings in order; ends at the first error that is not of one request."""

    def __init__(self, processor: Any, ends: frozenset[int], batch: int, threads: int) -> None:
        """``ends``: tokens that end an answer; ``batch``: most rows at once; ``threads``: of torch on the CPU."""
        self._processor = processor
        self._ends = ends
        self._batch = batch
        self._threads = threads
        self._waiting: deque[tuple[nn.Module, BatchRow | Scoring]] = deque()
        self._ready = threading.Condition()
        self.last_error = ""
        self.passed_at = time.monotonic()
        """When the last forward pass ended."""
        self._thread = threading.Thread(target=self._run, name="vlm-answers", daemon=True)
        self._thread.start()

    def put(self, model: nn.Module, work: BatchRow | Scoring) -> None:
        """Queue work. Raises :class:`EngineDead` when the thread has ended."""
        with self._ready:
            if self.last_error:
                raise EngineDead(self.last_error, _RESTART)
            self._waiting.append((model, work))
            self._ready.notify()

    def discard(self, work: BatchRow | Scoring) -> None:
        """Forget work whose caller has gone, where it still waits: its images would stay in memory until its turn."""
        with self._ready:
            self._waiting = deque(pair for pair in self._waiting if pair[1] is not work)

    def stop(self, why: str) -> None:
        """End the thread after the token it is at; what waits fails with ``why``."""
        with self._ready:
            self.last_error = self.last_error or why
            self._ready.notify()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        now: Sequence[BatchRow | Scoring] = ()
        try:
            while True:
                with self._ready:
                    self._ready.wait_for(lambda: self._waiting or self.last_error)
                    if self.last_error:
                        break
                    model, now = self._take()
                self._do(model, now)
        except Exception as error:
            self.stop(f"transformers could not answer: {error!r}")
        with self._ready:
            left = [*now, *(work for _, work in self._waiting)]
            self._waiting.clear()
        for work in left:
            work.fail(EngineDead(self.last_error, _RESTART))

    def _take(self) -> tuple[nn.Module, Sequence[BatchRow | Scoring]]:
        """The oldest work, and with a row as many more rows of its model as fit into the batch."""
        model, first = self._waiting.popleft()
        if isinstance(first, Scoring):
            return model, [first]
        rows: list[BatchRow | Scoring] = [first]
        others: deque[tuple[nn.Module, BatchRow | Scoring]] = deque()
        for other, work in self._waiting:
            if other is model and isinstance(work, BatchRow) and len(rows) < self._batch:
                rows.append(work)
            else:
                others.append((other, work))
        self._waiting = others
        return model, rows

    def _do(self, model: nn.Module, work: Sequence[BatchRow | Scoring]) -> None:
        self._answer(model, [one for one in work if isinstance(one, BatchRow)])
        for one in work:
            if isinstance(one, Scoring):
                self._score(model, one)

    def _answer(self, model: nn.Module, rows: Sequence[BatchRow]) -> None:
        rows = [row for row in rows if not (row.done or row.aborted)]
        if not rows:
            return
        try:
            answer(model, self._processor, rows, self._ends, self._stopped)
        except Exception as error:
            if len(rows) == 1:
                self._check(model, error)
                rows[0].end(error)
                return
            log.warning("A batch of %d requests failed and is tried in halves: %r", len(rows), error)
            for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                self._answer(model, half)

    def _score(self, model: nn.Module, one: Scoring) -> None:
        parts = [one.choices[i : i + self._batch] for i in range(0, len(one.choices), self._batch)]
        try:
            scores: list[float] = []
            for part in parts:
                scores += score(model, self._processor, one.request, part)
                self.passed_at = time.monotonic()
        except Exception as error:
            self._check(model, error)
            one.fail(as_failure(error))
        else:
            one.tell(scores)

    def _check(self, model: nn.Module, error: Exception) -> None:
        """Raise the error of a request again if the model cannot answer a good one either."""
        try:
            score(model, self._processor, PROBE, ["a"])
        except Exception:
            raise error from None

    def _stopped(self) -> bool:
        """Asked after each token."""
        self.passed_at = time.monotonic()
        return bool(self.last_error)
