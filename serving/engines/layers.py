"""Modules of a model that run fast and share weights: shells, packed linear layers, layouts of convolutions.

``torch.func.functional_call`` swaps tensors inside the one module for the time of the call, so that two threads with
two adapters would see each other's weights. A *shell* has the module tree of its own and the tensors in common: it
costs some milliseconds and no memory but for the weights that differ, and any number of threads may use it.

Eager torch packs a half-precision weight again in every call: for one image of a ViT-B-32 that is most of the work.
What ``torch.compile`` does when it freezes a graph is done here to single layers: linear layers and attention over
weights in oneDNN's own layout, packed once. It takes milliseconds, and layers of different adapters can share a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

ROWS: Final = 64
"""Rows per forward pass: more does not make a processor faster, and bounds the memory of activations."""
FEW: Final = 8
"""Images per pass of a convolutional tower on a CPU: their activations stay in its cache, 1.6 times as fast as 64."""
FILLS: Final = (
    "normal_", "uniform_", "trunc_normal_", "xavier_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_",
)  # fmt: skip
DRAWS: Final = {getattr(init, name) for name in FILLS} | {Tensor.normal_, Tensor.uniform_}
"""What fills weights, and returns them."""
RANDOM: Final[dict[Callable[..., Any], Callable[..., Any]]] = {torch.randn: torch.empty, torch.rand: torch.empty}


def shell_of(model: nn.Module, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model that shares every parameter and buffer with ``model`` but for ``changed`` (by parameter name)."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    shell = copy.deepcopy(model, dict(shared))
    for name, tensor in changed.items():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return shell


class SkipInit(TorchFunctionMode):
    """In its block, and in its thread, weights that would be random are whatever was in memory: for a model whose
    weights are about to be loaded. To draw those of a ViT-B-32 takes a processor a second and more.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return RANDOM.get(func, func)(*args, **(kwargs or {}))


def is_convolutional(visual: nn.Module) -> bool:
    """True for a tower that convolves throughout, and not only to cut an image into patches, as a ViT does."""
    return sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 2


def set_conv_layout(visual: nn.Module) -> bool:
    """Bring a convolutional tower's weights into the layout that is fastest, in place. True for such a tower.

    One convolution (the patch embedding of a ViT) gains nothing; a convolutional tower gains 10 to 25%.
    """
    wanted = is_convolutional(visual)
    if wanted:
        visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return wanted


def images_per_pass(visual: nn.Module, device: torch.device) -> int:
    """Images that a tower takes at a time."""
    return FEW if device.type == "cpu" and is_convolutional(visual) else ROWS


def can_pack(dtype: torch.dtype) -> bool:
    """True when this build of torch has the layout for this precision."""
    try:
        linear = PackedLinear(pack(torch.ones(16, 16, dtype=dtype)), None)
        return bool(torch.isfinite(linear(torch.ones(1, 16, dtype=dtype))).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """An opaque tensor [out, in] in the layout that multiplies fastest."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


class PackedLinear(nn.Module):
    """``x W^T + b`` for inference, or a GELU of it.

    The tensors are plain attributes: nothing moves or copies an opaque one.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu: nn.GELU | None = None) -> None:
        """``weight``: from :func:`pack`; ``bias``: of the same precision; ``gelu``: that comes next, computed on the
        way.
        """
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._after: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu.approximate)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., out]`` of ``[..., in]``."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self._after)
        return outputs


class PackedAttention(nn.Module):
    """Self-attention in place of a batch-first ``nn.MultiheadAttention``: the same call, the same result."""

    def __init__(self, inward: PackedLinear, outward: PackedLinear, heads: int) -> None:
        super().__init__()
        self.inward, self.outward, self.num_heads = inward, outward, heads
        self.batch_first = True

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """``[n, length of the query, width]``. Keys and values are of ``key``; the query is the same, or some of it."""
        parts = self.inward(key)
        own = parts if query is key else self.inward(query)
        return self.outward(attend(own, parts, self.num_heads, attn_mask)), None


def attend(query: torch.Tensor, parts: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``[n, length, width]`` of projections ``[n, length, 3 * width]``: the first third of ``query``, the others of
    ``parts``. ``mask``: as ``nn.MultiheadAttention`` takes it, ``[length, length]`` or ``[n * heads, length, length]``.
    """
    count, length, three = query.shape
    split = (count, -1, 3, heads, three // 3 // heads)
    first = query.view(split).permute(2, 0, 3, 1, 4)[0]
    _, keys, values = parts.view(split).permute(2, 0, 3, 1, 4).unbind(0)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(count, heads, *mask.shape[1:])
    attended = functional.scaled_dot_product_attention(first, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(count, length, three // 3)


def is_self_attention(owner: nn.Module, module: nn.Module) -> bool:
    """True for a block's attention of its input to itself, the only kind that :class:`PackedAttention` computes."""
    from open_clip.transformer import ResidualAttentionBlock

    return (
        isinstance(owner, ResidualAttentionBlock)
        and not hasattr(owner, "ln_1_kv")
        and isinstance(module, nn.MultiheadAttention)
        and module.batch_first
        and module.in_proj_weight is not None
        and module.bias_k is None
        and not module.add_zero_attn
    )
