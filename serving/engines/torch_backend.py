"""Towers run by torch, in float32, half precision or 8-bit integers. The float32 model stays memory-mapped and adapters
are merged into it. Base weights are converted once; adapters share those they do not change. On a CPU linear layers are
packed for oneDNN (:mod:`layers`). On a GPU, CUDA graphs run batches of fixed sizes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from serving.engines.layers import (
    PackedAttention,
    can_pack,
    images_per_pass,
    is_self_attention,
    pack,
    packed_linear,
    set_conv_layout,
    shell_of,
)
from serving.engines.preprocess import Preprocess
from serving.engines.processor import DTYPES, Precision
from serving.engines.towers import encode_image, encode_text

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes on a GPU, up to :data:`~serving.engines.layers.ROWS`."""
WARM_UP: Final = 3
"""Calls before a capture: libraries choose kernels and reserve memory in them, which a graph cannot contain."""
SLOTS: Final = 2
"""Staging buffers per shape: one is filled while the other is read."""
Forward = Callable[[torch.Tensor], torch.Tensor]
Form = Literal["same", "plain", "packed"]
"""Unchanged; converted in precision; also packed in oneDNN's layout."""
Converted = dict[Form, Any]


class TorchBackend:
    """Makes towers of one base, in one process. Called by one thread at a time, while others run earlier towers."""

    def __init__(
        self, model: nn.Module, preprocess: Preprocess, device: torch.device, precision: Precision = "float32"
    ) -> None:
        """``model``: the base in float32 (on ``device`` for that precision); its convolution layout changes."""
        self.preprocess = preprocess
        self.device = device
        self.precision = precision
        visual = model.get_submodule("visual")
        self.channels_last = set_conv_layout(visual) or device.type == "cuda"
        cpu, quantized = device.type == "cpu", precision == "int8"
        self.images_per_pass = images_per_pass(visual, device)
        self.dtype = DTYPES[precision]
        self._packs = cpu and can_pack(self.dtype, quantized)
        self._model = model
        self._parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
        converts = self._packs or precision != "float32"
        self._weights = ConvertedWeights(self.dtype, device, quantized) if converts else None
        if self._weights is not None:
            self._convert(shell_of(model, {}), self._weights)

    def convert(self, name: str, weight: torch.Tensor) -> Converted:
        """Convert an effective float32 weight of a parameter to the forms that :meth:`towers` takes."""
        if self._weights is not None and (converted := self._weights.convert_like(self._parameters[name], weight)):
            return converted
        return {"same": _channels_last(weight) if self.channels_last else weight}

    def towers(self, changed: Mapping[str, Converted]) -> TorchTowers:
        """Towers in which these weights (from :meth:`convert`, by parameter name) replace the base's."""
        same = {name: forms["same"] for name, forms in changed.items() if "same" in forms}
        shell = shell_of(self._model, same) if same or self._weights is not None else self._model
        if self._weights is not None:
            own = {self._parameters[name]: forms for name, forms in changed.items() if name not in same}
            self._convert(shell, self._weights.replaced(own))
        return TorchTowers(self, shell)

    def _convert(self, shell: nn.Module, weights: ConvertedWeights) -> None:
        """Replace tensors shared with the base by those of the wanted precision and layout."""
        for child in shell.children():
            _convert(child, weights, self._packs)
        _convert_own(shell, weights)


class TorchTowers:
    """Towers of a base or an adapter on it, ready to run. Thread safe."""

    def __init__(self, backend: TorchBackend, module: nn.Module) -> None:
        self._backend = backend
        self._passes = passes = _Passes(backend, module)
        cuda = backend.device.type == "cuda"
        self._images: Any = GraphedTower(passes.images, backend.device) if cuda else passes.images
        self._texts: Any = GraphedTower(passes.texts, backend.device) if cuda else passes.texts

    @torch.inference_mode()
    def images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """``float32 [n, dim]`` from ``uint8 [n, size, size, 3]``, not normalised."""
        step = self._backend.images_per_pass
        # A writable copy: torch gives no guarantees for read-only buffers (object store, mmap).
        parts = [
            self._images(torch.from_numpy(np.array(pixels[start : start + step])))
            for start in range(0, len(pixels), step)
        ]
        return _array(parts)

    @torch.inference_mode()
    def texts(self, ids: torch.Tensor) -> npt.NDArray[np.float32]:
        """``float32 [n, dim]`` from ``int64 [n, width]``, for n up to a pass's rows."""
        return _array([self._texts(ids)])


@dataclass
class _Passes:
    """Forward passes of both towers. A separate object: bound methods stored on their own owner would form a reference
    cycle that keeps its weights until garbage collection."""

    backend: TorchBackend
    module: nn.Module

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        batch = self.backend.preprocess.normalise_tensor(pixels.to(self.backend.device)).to(self.backend.dtype)
        if self.backend.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        return encode_image(self.module, batch).float()

    def texts(self, ids: torch.Tensor) -> torch.Tensor:
        return encode_text(self.module, ids.to(self.backend.device)).float()


class GraphedTower:
    """``[n, ...]`` in host memory to ``[n, dim]``, n up to the largest size. Thread safe. At small batches a CLIP tower
    is hundreds of microsecond kernels, and launching them from Python takes longer than they run. A CUDA graph launches
    all at once, but for one shape: batches are padded to the next size, and each shape is captured once."""

    def __init__(self, forward: Forward, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._steps: dict[tuple[int, ...], CudaStep] = {}
        self._lock = threading.Lock()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Outputs on the device, in memory of their own."""
        count = len(batch)
        shape = (next(size for size in SIZES if size >= count), *batch.shape[1:])
        with self._lock:
            step = self._steps.get(shape)
            if step is None:
                example = torch.zeros(shape, dtype=batch.dtype, device=self._device)
                step = self._steps[shape] = CudaStep(self._forward, example)
            return step.run(batch)[:count].clone()


class CudaStep:
    """A captured graph. Inputs pass through pinned memory on their own stream, so that copying a batch overlaps with
    the computation of the previous one."""

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
        # Captures this thread only: an adapter is prepared while another thread serves.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = forward(example)
        self._slots = deque(_Slot(example) for _ in range(SLOTS))

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """Outputs ``[size, dim]`` for at most ``size`` rows in host memory. Copy them before the next run."""
        self._slots.rotate()
        slot = self._slots[0]
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
    def __init__(self, example: torch.Tensor) -> None:
        self.pinned = torch.zeros(example.shape, dtype=example.dtype, pin_memory=True)
        self.staged = torch.zeros_like(example)
        cuda: Any = torch.cuda
        self.filled, self.read = cuda.Event(), cuda.Event()


class ConvertedWeights:
    """The base's tensors in another precision, each converted once per form."""

    def __init__(self, dtype: torch.dtype, device: torch.device, quantized: bool) -> None:
        self.dtype = dtype
        self.device = device
        self.quantized = quantized
        self._converted: dict[torch.Tensor, Converted] = {}

    def take(self, tensor: torch.Tensor, form: Form = "plain") -> Any:
        """A tensor in a form; integers keep their type."""
        forms = self._converted.setdefault(tensor, {})
        if form not in forms:
            forms[form] = self._convert(tensor, form)
        return forms[form]

    def convert_like(self, tensor: torch.Tensor, other: torch.Tensor) -> Converted:
        """Convert ``other`` to the forms that ``tensor`` was taken in."""
        return {form: self._convert(other, form) for form in self._converted.get(tensor, ())}

    def replaced(self, converted: Mapping[torch.Tensor, Converted]) -> ConvertedWeights:
        """A copy in which some tensors are replaced."""
        weights = ConvertedWeights(self.dtype, self.device, self.quantized)
        weights._converted = self._converted | dict(converted)
        return weights

    def _convert(self, tensor: torch.Tensor, form: Form) -> Any:
        plain = tensor.detach().to(self.device, self.dtype if tensor.is_floating_point() else None)
        return pack(plain, self.quantized) if form == "packed" else plain


def _convert(owner: nn.Module, weights: ConvertedWeights, packs: bool) -> None:
    children = [*owner.named_children(), ("", nn.Identity())]
    for (name, module), (following, after) in pairwise(children):
        if packs and type(module) is nn.Linear:
            gelu = after if type(after) is nn.GELU and type(owner) is nn.Sequential else None
            setattr(owner, name, _packed(module.weight, module.bias, weights, gelu))
            if gelu is not None:
                setattr(owner, following, nn.Identity())
        elif packs and is_self_attention(owner, module):
            attention: Any = module
            inward = _packed(attention.in_proj_weight, attention.in_proj_bias, weights)
            outward = _packed(attention.out_proj.weight, attention.out_proj.bias, weights)
            setattr(owner, name, PackedAttention(inward, outward, attention.num_heads))
        else:
            _convert(module, weights, packs)
    _convert_own(owner, weights)


def _convert_own(module: nn.Module, weights: ConvertedWeights) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(weights.take(parameter), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = weights.take(buffer)


def _packed(
    weight: torch.Tensor, bias: torch.Tensor | None, weights: ConvertedWeights, gelu: nn.GELU | None = None
) -> nn.Module:
    return packed_linear(weights.take(weight, "packed"), None if bias is None else weights.take(bias), gelu)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _array(parts: list[torch.Tensor]) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = torch.cat(parts).cpu().numpy()
    return rows
