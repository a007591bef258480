"""The graphs of a base's towers in ONNX, without its weights: they are given to each session.

A graph is exported once for a base and kept in its home. Weights keep the names of the model's parameters, so that a
session of an adapter differs in the values that it is given, and in nothing else. The exporter merges weights of equal
value and folds constants; it is given random weights, which are never equal, and folds nothing. A graph that then lacks
a weight of its tower (a batch norm that was folded into its convolution) cannot serve adapters, and is refused.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from core.errors import ConfigError
from core.files import replacing
from serving.engines.clip_base import ClipBase, construct
from serving.engines.packed_linear import attend, is_self_attention
from serving.engines.spaces import Tower, tower_of
from serving.engines.towers import encode_image, encode_text
from serving.engines.undrawn import Undrawn

OPSET: Final = 17
FORMAT: Final = 2
"""Of the file; another one is exported anew."""
INPUT: Final[dict[Tower, str]] = {"image": "pixels", "text": "ids"}
WEIGHTS_FILE: Final = "weights"
"""What the graph says of where its weights are. There is no such file: sessions are given them."""
_one_at_a_time = threading.Lock()


class _ImageTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return encode_image(self.model, pixels)


class _TextTower(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return encode_text(self.model, ids)


class _TracedAttention(nn.Module):
    """Self-attention with the weights of an ``nn.MultiheadAttention``, whose trace would hold the example's length."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.num_heads = attention.num_heads

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, *_: torch.Tensor, attn_mask: torch.Tensor | None = None, **__: Any
    ) -> tuple[torch.Tensor, None]:
        parts = functional.linear(key, self.in_proj_weight, self.in_proj_bias)
        own = parts if query is key else functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        return self.out_proj(attend(own, parts, self.num_heads, attn_mask)), None


def _traceable(owner: nn.Module) -> None:
    for name, module in list(owner.named_children()):
        if isinstance(module, nn.MultiheadAttention) and is_self_attention(owner, module):
            setattr(owner, name, _TracedAttention(module))
        else:
            _traceable(module)


def exported(base: ClipBase, tower: Tower, folder: Path) -> Path:
    """The graph of a tower in ``folder``, exported if it is not there (seconds).

    Raises ConfigError when the tower cannot be exported so that adapters can be served, or when onnx is not installed.
    """
    path = folder / f"{base.digest[:12]}-{tower}-{FORMAT}-torch{torch.__version__.split('+')[0]}.onnx"
    with _one_at_a_time:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _export(base, tower, path)
    return path


def weight_names(base: ClipBase, tower: Tower, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of a tower's floating-point tensors."""
    return [name for name, tensor in weights.items() if tower_of(name) == tower and tensor.is_floating_point()]


def _export(base: ClipBase, tower: Tower, path: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(
            "serve.engine is onnx, and the package onnx is not installed.",
            "Install ratchet-server[onnx], or set torch.",
        ) from error
    with Undrawn():
        model = construct(base.model_cfg, base.directory).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    _traceable(model)
    size = base.preprocess.size
    example = torch.rand(2, 3, size, size) if tower == "image" else torch.randint(1, 100, (2, base.context_length))
    axes = {0: "n"} if tower == "image" else {0: "n", 1: "width"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no ONNX
    try:
        with replacing(path) as work, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns of every shape that is read
            torch.onnx.export(
                (_ImageTower if tower == "image" else _TextTower)(model), (example,), str(work), dynamo=False,
                opset_version=OPSET, input_names=[INPUT[tower]], output_names=["vectors"], do_constant_folding=False,
                dynamic_axes={INPUT[tower]: axes, "vectors": {0: "n"}},
            )  # fmt: skip
            proto = onnx.load(str(work))
            _strip(proto, weight_names(base, tower, model.state_dict()), onnx)
            onnx.save(proto, str(work))
    except ConfigError:
        raise
    except Exception as error:  # of an exporter that meets what it does not know, anything
        raise ConfigError(
            f"The {tower} tower of {base.name!r} has no ONNX form: {type(error).__name__}: {str(error)[:200]}.",
            "Set serve.engine to torch.",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _strip(proto: Any, names: list[str], onnx: Any) -> None:
    """Take the weights out of a graph, and name them as the model does."""
    wanted = {f"model.{name}": name for name in names}
    missing = set(wanted)
    for initializer in proto.graph.initializer:
        if initializer.name not in wanted:
            continue
        missing.discard(initializer.name)
        initializer.ClearField("raw_data")
        initializer.ClearField("float_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        del initializer.external_data[:]
        initializer.external_data.add(key="location", value=WEIGHTS_FILE)
    if missing:
        raise ConfigError(
            f"Exported to ONNX, the tower loses {len(missing)} weights, first {sorted(missing)[0]}.",
            "Set serve.engine to torch.",
        )
