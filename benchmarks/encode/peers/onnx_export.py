"""Both towers of a base as ONNX graphs from pixels and token IDs to unit vectors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from benchmarks.encode.peers.hf_clip import write_tokenizer
from core.errors import BaseModelError
from core.progress import progress_log
from serving.engines.clip_base import ClipBase
from serving.engines.tokens import pad_rows

OPSET: Final = 17
ABOUT: Final = "model.json"
INSTALL: Final = "pip install onnx"


def export_onnx(base: ClipBase, folder: Path) -> Path:
    """Write ``image.onnx``, ``text.onnx``, ``tokenizer.json`` and ``model.json``; returns ``folder``.

    ``image.onnx``: ``pixels`` uint8 [n, size, size, 3]. ``text.onnx``: ``ids`` int64 [n, context]. Both return
    ``vectors``, float32 [n, dim]. A text tower that cannot be exported is left out with a message. Raises
    BaseModelError if the images are resized in another way than to their shorter side or to a square; or the package
    ``onnx`` is not installed, which torch's exporter needs.
    """
    if (folder / ABOUT).is_file():
        return folder
    if base.preprocess.resize_mode not in ("shortest", "squash"):
        raise BaseModelError(f"base {base.name!r} resizes images in a way that the peers do not know.")
    if importlib.util.find_spec("onnx") is None:
        raise BaseModelError("torch exports ONNX graphs with the package onnx, which is not installed.", INSTALL)
    folder.mkdir(parents=True, exist_ok=True)
    model = base.build_model()
    size = base.preprocess.size
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator has no place in ONNX
    try:
        pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        _export(_ImageGraph(base, model), pixels, folder / "image.onnx", {0: "n"}, "pixels")
        tokenizer = base.tokenizer()
        rows = tokenizer.rows(["a photo of a cat", "two red birds on a small boat"])
        ids = pad_rows(rows, base.context_length, tokenizer.pad_id)
        # At full length: torch's exporter writes the length of the example into the attention.
        _export(_TextGraph(model), ids, folder / "text.onnx", {0: "n"}, "ids")
    except Exception as error:  # of many kinds, by what a tower does
        if not (folder / "image.onnx").is_file():
            raise
        (folder / "text.onnx").unlink(missing_ok=True)
        progress_log.info(
            f"the text tower of {base.name} cannot be exported: {type(error).__name__}: {str(error)[:200]}"
        )
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    _write_tokenizer(base, folder)
    about: dict[str, Any] = {
        "size": size, "bilinear": base.preprocess.interpolation == "bilinear",
        "squash": base.preprocess.resize_mode == "squash",
        "context_length": base.context_length, "dim": base.dim,
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def _export(graph: nn.Module, example: torch.Tensor, path: Path, dynamic: dict[int, str], name: str) -> None:
    with torch.inference_mode():
        torch.onnx.export(
            graph.eval(), (example,), str(path), dynamo=False, opset_version=OPSET,
            input_names=[name], output_names=["vectors"], dynamic_axes={name: dynamic, "vectors": {0: "n"}},
        )  # fmt: skip


def _write_tokenizer(base: ClipBase, folder: Path) -> None:
    if base.tokenizer_cfg["kind"] == "simple":
        write_tokenizer(folder, base.context_length)
    else:
        shutil.copy2(base.directory / base.tokenizer_cfg["directory"] / "tokenizer.json", folder / "tokenizer.json")


class _ImageGraph(nn.Module):
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, base: ClipBase, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255.0 * torch.tensor(base.preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255.0 * torch.tensor(base.preprocess.std).view(1, 3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std
        return functional.normalize(self.model.encode_image(images), dim=-1)  # type: ignore[operator]


class _TextGraph(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.model.encode_text(ids), dim=-1)  # type: ignore[operator]
