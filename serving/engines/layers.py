"""Model building blocks that run fast and share weights. ``torch.func.functional_call`` swaps tensors inside the module
itself, so two threads with two adapters would see each other's weights. A *shell* is a separate module tree over shared
tensors: it takes milliseconds to make, memory only for weights that differ, and is safe to use from any number of
threads. Eager torch packs half-precision weights in every call, most of the work for one image of a ViT-B-32. Here
linear layers and attention keep weights packed once in oneDNN's layout, which adapters can share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

ROWS: Final = 64
"""Rows per forward pass: more is not faster on a CPU; bounds the memory of activations."""
FEW: Final = 8
"""Images per pass of a convolutional tower on a CPU: activations stay in cache, 1.6 times as fast as 64 in float32."""
TINY: Final = 1e-12
"""Least magnitude of a row: one of zeros stays zero."""
CENTER: Final = torch.tensor(128.5)
"""oneDNN is fast with unsigned inputs, so 128 stands for zero; the half makes the conversion round."""
DRAWS: Final = {
    init.normal_, init.uniform_, init.trunc_normal_, init.xavier_normal_, init.xavier_uniform_, init.kaiming_normal_,
    init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_,
}  # fmt: skip
"""Functions that fill weights with random values and return them."""
RANDOM: Final[dict[Callable[..., Any], Callable[..., Any]]] = {torch.randn: torch.empty, torch.rand: torch.empty}


def shell_of(model: nn.Module, changed: Mapping[str, torch.Tensor]) -> nn.Module:
    """A model that shares all parameters and buffers with ``model`` except ``changed`` (by parameter name)."""
    shell = _shell(model, {})
    for name, tensor in changed.items():
        owner, _, leaf = name.rpartition(".")
        shell.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    return shell


def _shell(module: nn.Module, shells: dict[nn.Module, nn.Module]) -> nn.Module:
    # copy.deepcopy also copies thousands of empty dictionaries of hooks, a quarter of a small adapter's load.
    if module not in shells:
        shells[module] = shell = module.__class__.__new__(module.__class__)
        own = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers")}
        children = {name: child and _shell(child, shells) for name, child in module._modules.items()}
        vars(shell).update(vars(module), **own, _modules=children)
    return shells[module]


class SkipInit(TorchFunctionMode):
    """Leaves weights uninitialised instead of random, within its block and thread, for models whose weights are loaded
    next. Random initialisation of a ViT-B-32 takes over a second on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return RANDOM.get(func, func)(*args, **(kwargs or {}))


def is_convolutional(visual: nn.Module) -> bool:
    """True for a tower that convolves throughout, not just to cut patches as a ViT does."""
    return sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 2


def set_conv_layout(visual: nn.Module) -> bool:
    """Convert a convolutional tower's weights to the fastest layout in place; True if it is convolutional.
    Convolutional towers gain 10 to 25%; the single patch embedding of a ViT gains nothing."""
    wanted = is_convolutional(visual)
    if wanted:
        visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return wanted


def images_per_pass(visual: nn.Module, device: torch.device) -> int:
    return FEW if device.type == "cpu" and is_convolutional(visual) else ROWS


def can_pack(dtype: torch.dtype, quantized: bool = False) -> bool:
    try:
        linear = packed_linear(pack(torch.ones(16, 16, dtype=dtype), quantized), None)
        return bool(torch.isfinite(linear(torch.ones(1, 16, dtype=dtype))).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [out, in] as 8-bit integers, symmetric around zero."""

    packed: Tensor
    """Opaque, in oneDNN's layout."""
    scales: Tensor
    """float32 [out]: each row's largest magnitude over the largest integer."""
    zeros: Tensor
    dtype: torch.dtype = torch.float32
    """Of inputs and outputs; open_clip asks a layer's weight for it."""


PackedWeight = Tensor | QuantizedWeight


def pack(weight: torch.Tensor, quantized: bool = False) -> PackedWeight:
    """Pack a weight [out, in] into oneDNN's layout, as integers if ``quantized``; the result is opaque."""
    plain = weight.detach().contiguous()
    if not quantized:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(plain)
        return packed
    return _quantized(plain, largest_integer())


@cache
def largest_integer() -> int:
    """Of weights. A processor without VNNI and AMX adds pairs of products in 16 bits, which overflow unless weights
    have seven bits: oneDNN's guide, "Nuances of int8 computations"."""
    saturated = QuantizedLinear(_quantized(torch.ones(16, 16), 127), None)(torch.ones(1, 16))
    return 127 if torch.allclose(saturated, torch.tensor(16.0), rtol=0.01) else 64


def _quantized(plain: Tensor, largest: int) -> QuantizedWeight:
    scales = _scales(plain, largest)
    integers = (plain / scales).round_().to(torch.int8)
    zeros = torch.zeros(len(plain), dtype=torch.int32)
    return QuantizedWeight(torch.ops.onednn.qlinear_prepack(integers, None), scales.flatten(), zeros)


def _scales(rows: Tensor, largest: int = 127) -> Tensor:
    """The largest magnitude of each row over the largest integer: [rows, 1]."""
    # Ten times as fast as vector_norm's largest magnitude, which is not vectorized.
    magnitudes = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    return magnitudes.clamp_min_(TINY).div_(largest)


def packed_linear(weight: PackedWeight, bias: Tensor | None, gelu: nn.GELU | None = None) -> nn.Module:
    """A linear layer for inference. ``weight``: from :func:`pack`; ``bias``: of the same precision as inputs; ``gelu``:
    the following GELU."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedLinear(weight, bias, gelu)
    return PackedLinear(weight, bias, gelu)


class PackedLinear(nn.Module):
    """``x W^T + b``, with a fused GELU if there is one. Tensors are plain attributes: opaque ones cannot be moved."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self._after: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], gelu.approximate)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self._after)
        return outputs


class QuantizedLinear(nn.Module):
    """The same with products of 8-bit integers. Each row of the input has a scale of its own (a token's: ZeroQuant, Yao
    et al., NeurIPS 2022). So a vector does not depend on the others of its batch, and nothing has to be calibrated."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.gelu = weight, bias, gelu

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, float32."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        scales, weight = _scales(rows), self.weight
        integers = torch.addcdiv(CENTER, rows, scales).to(torch.uint8)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, 128, weight.packed, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        outputs = products.mul_(scales) if self.bias is None else torch.addcmul(self.bias, products, scales)
        if self.gelu is not None:
            outputs = self.gelu(outputs)
        return outputs.reshape(*inputs.shape[:-1], -1)


class PackedAttention(nn.Module):
    """Self-attention, a drop-in for a batch-first ``nn.MultiheadAttention``."""

    def __init__(self, inward: nn.Module, outward: nn.Module, heads: int) -> None:
        super().__init__()
        self.inward, self.outward, self.num_heads = inward, outward, heads
        self.batch_first = True

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """``[n, query length, width]``. Keys and values come from ``key``; ``query`` is the same or a part of it."""
        parts = self.inward(key)
        own = parts if query is key else self.inward(query)
        return self.outward(attend(own, parts, self.num_heads, attn_mask)), None


def attend(query: torch.Tensor, parts: torch.Tensor, heads: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``[n, length, width]`` from projections ``[n, length, 3 * width]``: the query third of ``query``, keys and values
    of ``parts``. ``mask``: as in ``nn.MultiheadAttention``, ``[length, length]`` or ``[n * heads, length, length]``."""
    count, length, three = query.shape
    split = (count, -1, 3, heads, three // 3 // heads)
    first = query.view(split).permute(2, 0, 3, 1, 4)[0]
    _, keys, values = parts.view(split).permute(2, 0, 3, 1, 4).unbind(0)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(count, heads, *mask.shape[1:])
    attended = functional.scaled_dot_product_attention(first, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(count, length, three // 3)


def is_self_attention(owner: nn.Module, module: nn.Module) -> bool:
    """True for a block's self-attention of a kind that :class:`PackedAttention` computes."""
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
