"""Towers run by ONNX Runtime: OpenVINO's plugin or the default provider on a CPU, TensorRT or CUDA on a GPU. A tower's
graph is exported once per base, without weights, into its home. Weights keep the parameters' names and are given to
each session, which holds a compiled copy: adapters share the graph and the base's float32 tensors only.

The exporter would merge equal weights and fold constants, so it gets random weights and folding is off. A graph that
still lacks a weight of its tower (a batch norm folded into its convolution) cannot serve adapters. Torch runs towers
without an ONNX form, in float32."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from core.errors import ConfigError
from core.files import replacing
from serving.engines.backends import Precision, Towers
from serving.engines.clip_base import ClipBase, Tower, construct, tower_of
from serving.engines.layers import ROWS, SkipInit, attend, is_self_attention
from serving.engines.preprocess import Preprocess
from serving.engines.torch_backend import TorchBackend
from serving.engines.towers import encode_image, encode_text

log = logging.getLogger("ratchet.engine")

PLUGIN: Final = "OpenVINOPluginExecutionProvider"
"""Name under which OpenVINO's library is registered; its devices are called OpenVINOExecutionProvider."""
HINTS: Final[dict[Precision, str]] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
OPSET: Final = 17
FORMAT: Final = 2
"""Version of the file; graphs of others are exported again."""
INPUT: Final[dict[Tower, str]] = {"image": "pixels", "text": "ids"}
_one_at_a_time = threading.Lock()


class OnnxBackend:
    def __init__(self, base: ClipBase, model: nn.Module, device: torch.device, precision: Precision) -> None:
        """``model``: the base in float32 on the CPU. Raises ConfigError when the runtime or a provider is missing."""
        self.base = base
        self._precision, self._threads = precision, torch.get_num_threads()
        self._providers, self._device = _providers(device, precision)
        folder = base.directory.parent.parent / "engines"
        self._graphs: dict[Tower, Path] = {}
        self._weights: dict[Tower, dict[str, torch.Tensor]] = {}
        for tower in INPUT:
            self._weights[tower] = _weights_of(model, tower)
            try:
                self._graphs[tower] = exported(base, tower, folder)
            except ConfigError as error:
                log.warning("%s torch runs it in float32.", error)
        if not self._graphs:
            raise ConfigError(f"No tower of {base.name!r} has an ONNX form.", "Set serve.engine to torch.")
        self._torch = TorchBackend(model, base.preprocess, torch.device("cpu"))
        self._base_sessions = {tower: self._session(tower, {}) for tower in self._graphs}

    def convert(self, name: str, weight: torch.Tensor) -> Any:
        return weight if tower_of(name) in self._graphs else self._torch.convert(name, weight)

    def towers(self, changed: Mapping[str, Any]) -> OnnxTowers:
        """See :meth:`Backend.towers`. Compiles the towers that the adapter changes (seconds) and shares the others."""
        sessions = dict(self._base_sessions)
        for tower in self._graphs:
            own = {name: tensor for name, tensor in changed.items() if tower_of(name) == tower}
            if own:
                sessions[tower] = self._session(tower, own)
        rest = None
        if len(sessions) < len(INPUT):
            rest = self._torch.towers({name: own for name, own in changed.items() if tower_of(name) not in sessions})
        return OnnxTowers(self.base.preprocess, sessions, rest)

    def _session(self, tower: Tower, changed: Mapping[str, torch.Tensor]) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only: the runtime warns about every given initializer
        options.intra_op_num_threads = self._threads
        if self._device is not None:
            hints = {"INFERENCE_PRECISION_HINT": HINTS[self._precision], "INFERENCE_NUM_THREADS": self._threads}
            options.add_provider_for_devices([self._device], {"load_config": json.dumps({"CPU": hints})})
        weights = self._weights[tower] | dict(changed)
        arrays = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in weights.items()}
        options.add_external_initializers(
            [f"model.{name}" for name in arrays], [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        )
        session = ort.InferenceSession(str(self._graphs[tower]), options, providers=self._providers)
        size = self.base.preprocess.size
        blank = np.zeros((1, 3, size, size), np.float32) if tower == "image" else np.zeros((1, 8), np.int64)
        session.run(None, {INPUT[tower]: blank})
        return session


@dataclass
class OnnxTowers:
    preprocess: Preprocess
    sessions: Mapping[Tower, Any]
    rest: Towers | None
    """Runs the tower that has no session."""

    def images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if (session := self.sessions.get("image")) is None:
            assert self.rest is not None
            return self.rest.images(pixels)
        parts = [
            session.run(None, {INPUT["image"]: self.preprocess.normalise(pixels[start : start + ROWS]).numpy()})[0]
            for start in range(0, len(pixels), ROWS)
        ]
        return np.concatenate(parts)

    def texts(self, ids: torch.Tensor) -> npt.NDArray[np.float32]:
        if (session := self.sessions.get("text")) is None:
            assert self.rest is not None
            return self.rest.texts(ids)
        vectors: npt.NDArray[np.float32] = session.run(None, {INPUT["text"]: ids.numpy()})[0]
        return vectors


def _providers(device: torch.device, precision: Precision) -> tuple[list[Any] | None, Any]:
    """Execution providers for a device and precision, or OpenVINO's device instead. Raises ConfigError when ONNX
    Runtime is not installed or cannot compute at this precision here."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ConfigError(
            "serve.engine is onnx, and ONNX Runtime is not installed.",
            "Install ratchet-server[onnx] (CPU) or ratchet-server[onnx-gpu], or set serve.engine to torch.",
        ) from error
    if device.type == "cuda":
        return _gpu_providers(ort, precision), None
    openvino = _openvino_device(ort)
    if openvino is None and precision != "float32":
        raise ConfigError(
            f"On a CPU ONNX Runtime computes in {precision} with OpenVINO's plugin only, which is not installed or "
            "does not know this processor.",
            "Install ratchet-server[onnx], or set serve.precision to float32.",
        )
    return ["CPUExecutionProvider"] if openvino is None else None, openvino


def _openvino_device(ort: Any) -> Any:
    """OpenVINO's CPU device; None if the plugin is missing or does not know the processor."""
    if not _openvino_registered(ort):
        return None
    kind = ort.OrtHardwareDeviceType.CPU
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "OpenVINOExecutionProvider" and d.device.type == kind]
    return devices[0] if devices else None


@cache
def _openvino_registered(ort: Any) -> bool:
    """Register OpenVINO's plugin, once per process, even if it then has no device (AMD)."""
    try:
        import onnxruntime_ep_openvino as plugin
    except ImportError:
        return False
    ort.register_execution_provider_library(PLUGIN, plugin.get_library_path())
    return True


def _gpu_providers(ort: Any, precision: Precision) -> list[Any]:
    available = ort.get_available_providers()
    if "TensorrtExecutionProvider" in available and precision != "float32":
        half = {"trt_fp16_enable": precision == "float16", "trt_bf16_enable": precision == "bfloat16"}
        return [("TensorrtExecutionProvider", half), "CUDAExecutionProvider"]
    if "CUDAExecutionProvider" in available and precision == "float32":
        return ["CUDAExecutionProvider"]
    raise ConfigError(
        f"ONNX Runtime has no provider for {precision} on this GPU ({', '.join(available)}).",
        "Install TensorRT, or set serve.engine to torch.",
    )


class _Traced(nn.Module):
    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.encode(self.model, inputs)


class _TracedAttention(nn.Module):
    """Self-attention with the weights of an ``nn.MultiheadAttention``, whose trace would fix the example's length."""

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
    """The graph of a tower in ``folder``, exported if it is missing (seconds). Raises ConfigError when onnx is not
    installed, or the tower has no export that can serve adapters."""
    path = folder / f"{base.digest[:12]}-{tower}-{FORMAT}-torch{torch.__version__.split('+')[0]}.onnx"
    with _one_at_a_time:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _export(base, tower, path)
    return path


def _export(base: ClipBase, tower: Tower, path: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(
            "serve.engine is onnx, and the package onnx is not installed.",
            "Install ratchet-server[onnx], or set torch.",
        ) from error
    with SkipInit():
        model = construct(base.model_cfg, base.directory).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    _traceable(model)
    size = base.preprocess.size
    example = torch.rand(2, 3, size, size) if tower == "image" else torch.randint(1, 100, (2, base.context_length))
    axes = {0: "n"} if tower == "image" else {0: "n", 1: "width"}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operator has no ONNX form
    try:
        with replacing(path) as work, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing warns about every shape that is read
            torch.onnx.export(
                _Traced(model, encode_image if tower == "image" else encode_text), (example,), str(work), dynamo=False,
                opset_version=OPSET, input_names=[INPUT[tower]], output_names=["vectors"], do_constant_folding=False,
                dynamic_axes={INPUT[tower]: axes, "vectors": {0: "n"}},
            )  # fmt: skip
            proto = onnx.load(str(work))
            _strip(proto, _weights_of(model, tower), onnx)
            onnx.save(proto, str(work))
    except ConfigError:
        raise
    except Exception as error:  # exporters raise anything for unknown operators
        raise ConfigError(
            f"The {tower} tower of {base.name!r} has no ONNX form: {type(error).__name__}: {str(error)[:200]}.",
            "Set serve.engine to torch.",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _weights_of(model: nn.Module, tower: Tower) -> dict[str, torch.Tensor]:
    state = model.state_dict().items()
    return {name: tensor.detach() for name, tensor in state if tower_of(name) == tower and tensor.is_floating_point()}


def _strip(proto: Any, names: Mapping[str, Any], onnx: Any) -> None:
    """Remove the weights, which have the model's names, from a graph."""
    missing = {f"model.{name}" for name in names}
    for initializer in proto.graph.initializer:
        if initializer.name not in missing:
            continue
        missing.discard(initializer.name)
        initializer.ClearField("raw_data")
        initializer.ClearField("float_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        del initializer.external_data[:]
        initializer.external_data.add(key="location", value="weights")  # no such file: sessions are given them
    if missing:
        raise ConfigError(
            f"Exported to ONNX, the tower loses {len(missing)} weights, first {sorted(missing)[0]}.",
            "Set serve.engine to torch.",
        )
