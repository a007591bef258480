"""Forward passes of fixed batch sizes on a GPU, each captured once as a CUDA graph.

A CLIP tower at a small batch is hundreds of kernels of a few microseconds: launching them one by one from Python costs
more than running them. A graph launches them all at once, but has one shape and one place for its inputs. Batches are
padded to the next size; inputs go through pinned memory on a stream of their own, so that the copy of one batch runs
beside the computation of the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Rows of a batch; more than the last one is not passed in (see ``conv_layout.ROWS``)."""
WARM_UP: Final = 3
"""Calls before a capture: libraries choose kernels and reserve memory in them, which a graph cannot hold."""
SLOTS: Final = 2
"""Staging buffers of a shape: one is filled while the other is read."""
Forward = Callable[[torch.Tensor], torch.Tensor]


class Step(Protocol):
    """One shape's forward pass."""

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """Outputs ``[size, dim]`` of at most ``size`` rows in host memory; to be copied before the next run."""


class GraphedTower:
    """``[n, dim]`` of ``[n, ...]`` in host memory, n up to the largest size. Safe to call from several threads."""

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        sizes: tuple[int, ...] = SIZES,
        capture: Callable[[Forward, torch.Tensor], Step] | None = None,
    ) -> None:
        """``forward``: from inputs on ``device``; ``capture``: makes a step from it and an example, by default
        :class:`CudaStep`.
        """
        self._forward = forward
        self._device = device
        self._sizes = sizes
        self._capture = capture or CudaStep
        self._steps: dict[tuple[int, ...], Step] = {}
        self._lock = threading.Lock()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Outputs on the device, in memory of their own."""
        count = len(batch)
        size = next(size for size in self._sizes if size >= count)
        shape = (size, *batch.shape[1:])
        with self._lock:
            step = self._steps.get(shape)
            if step is None:
                example = torch.zeros(shape, dtype=batch.dtype, device=self._device)
                step = self._steps[shape] = self._capture(self._forward, example)
            return step.run(batch)[:count].clone()


class CudaStep:
    """A captured graph with its inputs, and staging buffers before it."""

    def __init__(self, forward: Forward, example: torch.Tensor) -> None:
        self._inputs = example
        cuda: Any = torch.cuda
        self._copies = cuda.Stream()
        side = cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                forward(example)
        torch.cuda.current_stream().wait_stream(side)
        self._graph: Any = torch.cuda.CUDAGraph()
        # Of this thread only: an adapter is prepared while another thread serves.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = forward(example)
        self._slots = [_Slot(example) for _ in range(SLOTS)]
        self._turn = 0

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """See :class:`Step`."""
        self._turn = (self._turn + 1) % SLOTS
        slot = self._slots[self._turn]
        slot.read.synchronize()
        slot.pinned[: len(batch)].copy_(batch)
        with torch.cuda.stream(self._copies):
            slot.staged.copy_(slot.pinned, non_blocking=True)
            slot.filled.record(self._copies)
        stream = torch.cuda.current_stream()
        stream.wait_event(slot.filled)
        self._inputs.copy_(slot.staged)
        slot.read.record(stream)
        self._graph.replay()
        return self._outputs


class _Slot:
    """Pinned host memory, device memory, and the events at which they are filled and read."""

    def __init__(self, example: torch.Tensor) -> None:
        self.pinned = torch.zeros(example.shape, dtype=example.dtype, pin_memory=True)
        self.staged = torch.zeros_like(example)
        cuda: Any = torch.cuda
        self.filled, self.read = cuda.Event(), cuda.Event()
