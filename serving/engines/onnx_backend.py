"""Towers run by ONNX Runtime: OpenVINO's plugin or the default provider on a CPU, TensorRT or CUDA on a GPU.

A session holds a compiled copy of its weights, whatever it was given: adapters share the graph and the base's float32
tensors, not what was compiled from them. A tower that has no ONNX form is run by torch in float32.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from core.errors import ConfigError
from serving.engines.backends import Precision
from serving.engines.clip_base import ClipBase
from serving.engines.conv_layout import ROWS
from serving.engines.onnx_export import INPUT, exported
from serving.engines.spaces import Tower, tower_of
from serving.engines.torch_backend import TorchBackend

log = logging.getLogger("ratchet.engine")

PLUGIN: Final = "OpenVINOPluginExecutionProvider"
"""Name under which OpenVINO's library is registered; devices call it OpenVINOExecutionProvider."""
HINTS: Final[dict[Precision, str]] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
BYTES: Final[dict[Precision, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}
WARNING_LEVEL: Final = 3
"""Errors only: the runtime warns of every initializer that it was given."""


class OnnxBackend:
    """Implements :class:`serving.engines.backends.Backend`."""

    def __init__(self, base: ClipBase, model: nn.Module, device: torch.device, precision: Precision) -> None:
        """``model``: the base in float32 on the CPU. Raises ConfigError when the runtime or a provider is missing."""
        self.base = base
        self.precision = precision
        self.providers = Providers(device, precision, torch.get_num_threads())
        self._weights = {
            name: tensor.detach() for name, tensor in model.state_dict().items() if tensor.is_floating_point()
        }
        folder = base.directory.parent.parent / "engines"
        self._graphs: dict[Tower, Path] = {}
        for tower in ("image", "text"):
            try:
                self._graphs[tower] = exported(base, tower, folder)
            except ConfigError as error:
                log.warning("%s torch runs it in float32.", error)
        if not self._graphs:
            raise ConfigError(f"No tower of {base.name!r} has an ONNX form.", "Set serve.engine to torch.")
        self._torch = TorchBackend(model, base.preprocess, torch.device("cpu"))
        self._base_sessions = {tower: self._session(tower, {}) for tower in self._graphs}

    def convert(self, name: str, weight: torch.Tensor) -> Any:
        """See :meth:`Backend.convert`."""
        return weight if tower_of(name) in self._graphs else self._torch.convert(name, weight)

    def towers(self, changed: Mapping[str, Any]) -> OnnxTowers:
        """See :meth:`Backend.towers`. Compiles a tower that the adapter changes (seconds), and shares the other one."""
        sessions, size = dict(self._base_sessions), 0
        for tower in self._graphs:
            own = {name: tensor for name, tensor in changed.items() if tower_of(name) == tower}
            if own:
                sessions[tower] = self._session(tower, own)
                count = sum(tensor.numel() for name, tensor in self._weights.items() if tower_of(name) == tower)
                size += count * BYTES[self.precision]
        return OnnxTowers(self, self._torch, changed, sessions, size)

    def _session(self, tower: Tower, changed: Mapping[str, torch.Tensor]) -> Any:
        import onnxruntime as ort

        options = self.providers.options()
        weights = {name: tensor for name, tensor in self._weights.items() if tower_of(name) == tower} | dict(changed)
        arrays = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in weights.items()}
        options.add_external_initializers(
            [f"model.{name}" for name in arrays],
            [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()],
        )
        session = ort.InferenceSession(str(self._graphs[tower]), options, providers=self.providers.names)
        size = self.base.preprocess.size
        blank = np.zeros((1, 3, size, size), np.float32) if tower == "image" else np.zeros((1, 8), np.int64)
        session.run(None, {INPUT[tower]: blank})
        return session


class OnnxTowers:
    """Implements :class:`serving.engines.backends.Towers`."""

    def __init__(
        self,
        backend: OnnxBackend,
        fallback: TorchBackend,
        changed: Mapping[str, Any],
        sessions: Mapping[Tower, Any],
        size: int,
    ) -> None:
        self._preprocess = backend.base.preprocess
        self._sessions = sessions
        missing = {name: weight for name, weight in changed.items() if tower_of(name) not in sessions}
        self._fallback = fallback.towers(missing) if len(sessions) < len(INPUT) else None
        self.bytes = size + (self._fallback.bytes if self._fallback is not None else 0)

    @property
    def model(self) -> None:
        """See :class:`Towers`."""
        return None

    def images(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See :class:`Towers`."""
        session = self._sessions.get("image")
        if session is None:
            assert self._fallback is not None
            return self._fallback.images(pixels)
        parts = [
            session.run(None, {INPUT["image"]: self._preprocess.normalise(pixels[start : start + ROWS]).numpy()})[0]
            for start in range(0, len(pixels), ROWS)
        ]
        return np.concatenate(parts)

    def texts(self, ids: torch.Tensor) -> npt.NDArray[np.float32]:
        """See :class:`Towers`."""
        session = self._sessions.get("text")
        if session is None:
            assert self._fallback is not None
            return self._fallback.texts(ids)
        vectors: npt.NDArray[np.float32] = session.run(None, {INPUT["text"]: ids.numpy()})[0]
        return vectors


class Providers:
    """What executes the graphs on a device at a precision."""

    def __init__(self, device: torch.device, precision: Precision, threads: int) -> None:
        """Raises ConfigError when ONNX Runtime is not installed, or nothing of it computes at this precision here."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise ConfigError(
                "serve.engine is onnx, and ONNX Runtime is not installed.",
                "Install ratchet-server[onnx] (CPU) or ratchet-server[onnx-gpu], or set serve.engine to torch.",
            ) from error
        self.threads = threads
        self.names: list[Any] | None = None
        self._load_config = ""
        self._device: Any = None
        if device.type == "cuda":
            self.names = _gpu_providers(ort, precision)
            return
        self._device = _openvino_device(ort)
        if self._device is not None:
            cpu = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": threads}
            self._load_config = json.dumps({"CPU": cpu})
        elif precision == "float32":
            self.names = ["CPUExecutionProvider"]
        else:
            raise ConfigError(
                f"On a CPU ONNX Runtime computes in {precision} with OpenVINO's plugin only, which is not installed or "
                "does not know this processor.",
                "Install ratchet-server[onnx], or set serve.precision to float32.",
            )

    def options(self) -> Any:
        """Options of a new session."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = WARNING_LEVEL
        options.intra_op_num_threads = self.threads
        if self._device is not None:
            options.add_provider_for_devices([self._device], {"load_config": self._load_config})
        return options


def _openvino_device(ort: Any) -> Any:
    """The processor as OpenVINO's plugin sees it; None where the plugin is not installed, or does not know it."""
    if not _openvino_registered(ort):
        return None
    kind = ort.OrtHardwareDeviceType.CPU
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "OpenVINOExecutionProvider" and d.device.type == kind]
    return devices[0] if devices else None


@cache
def _openvino_registered(ort: Any) -> bool:
    """Register OpenVINO's plugin, which a process may do once, also where it has no device then (AMD)."""
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
