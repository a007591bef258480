"""The most bytes that autograd keeps at once for a backward pass, by the same count on a CPU and on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from updater.adapters.parametrizations import Parametrization


class _SavedBytes:
    """Bytes that autograd keeps for backward passes, now and at most; a storage counts once, until nothing of it is
    saved_bytes. Parameters do not count, nor what is excluded.
    """

    def __init__(self) -> None:
        self.most = 0
        self._now = 0
        self._users: Counter[int] = Counter()
        self._excluded: dict[int, Tensor] = {}  # held, since a freed storage's address may be used again

    def exclude(self, tensor: Tensor) -> None:
        """Count nothing of this tensor's storage."""
        self._excluded[_address(tensor)] = tensor.detach()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        """The hook of a tensor that is saved."""
        parameter = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        return tensor if parameter or _address(tensor) in self._excluded else _Saved(tensor, self)

    def add(self, tensor: Tensor) -> None:
        """One more use of a storage."""
        self._users[_address(tensor)] += 1
        if self._users[_address(tensor)] == 1:
            self._now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self._now)

    def remove(self, tensor: Tensor) -> None:
        """One use less."""
        self._users[_address(tensor)] -= 1
        if not self._users[_address(tensor)]:
            self._now -= tensor.untyped_storage().nbytes()


class _Saved:
    """A saved tensor; autograd lets go of it when its node's backward pass is over."""

    def __init__(self, tensor: Tensor, saved_bytes: _SavedBytes) -> None:
        self.tensor, self._saved_bytes = tensor, saved_bytes
        saved_bytes.add(tensor)

    def __del__(self) -> None:
        self._saved_bytes.remove(self.tensor)


class _AttentionExtras(TorchDispatchMode):
    """Excludes what an attention kernel returns beside its output: the normalisers of its softmax, seeds, paddings.

    They are small, and differ between the kernels of a CPU and of a GPU.
    """

    def __init__(self, saved_bytes: _SavedBytes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved_bytes = saved_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
            for extra in output[1:]:
                if isinstance(extra, Tensor):
                    self._saved_bytes.exclude(extra)
        return output


@contextmanager
def peak_saved_bytes(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Most bytes that are kept at once for backward passes inside, on every device by the same count.

    An allocator's figure would hold temporary buffers, caches and rounding, which no CPU reports, and which depend on
    the GPU: its ratio to what is counted elsewhere means nothing. Weights of the model that could stand where a
    parameter does count no more than parameters.
    """
    saved_bytes = _SavedBytes()
    for parameter in model.parameters():  # of which layers save views: a linear layer its transpose
        saved_bytes.exclude(parameter)
    hooks = [
        kind.register_forward_hook(lambda _, __, weight: saved_bytes.exclude(weight))
        for kind in replaced_weights(model)
    ]
    try:
        with saved_tensors_hooks(saved_bytes.pack, _unpack), _AttentionExtras(saved_bytes):
            yield lambda: float(saved_bytes.most)
    finally:
        for hook in hooks:
            hook.remove()


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor if isinstance(saved, _Saved) else saved


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def replaced_weights(model: nn.Module) -> list[nn.Module]:
    """What forms a whole weight in place of a parameter of the base."""
    return [module for module in model.modules() if isinstance(module, Parametrization) and module.in_place]
