"""Infinity, mosec and OpenVINO: installed, given the same weights, and started."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Final

import torch

from benchmarks.encode.payloads import BodyTemplate, jpegs, text
from benchmarks.encode.peers.environment import Environment, same_torch
from benchmarks.encode.peers.hf_clip import write_hf_clip
from benchmarks.encode.peers.onnx_export import export_onnx
from benchmarks.encode.peers.process import PeerProcess
from benchmarks.line_worker import LineWorker
from core.addresses import free_port
from serving.engines.clip_base import ClipBase
from serving.engines.processor import Precision
from serving.messages import Modality

INFINITY: Final = (
    # Without its extra "vision", whose ColPali is not needed, and without optimum: BetterTransformer, which it imports
    # where optimum is there, is in none that goes with this transformers.
    "infinity-emb[torch,server]==0.0.78", "aiohttp", "pillow", "transformers<5",
    "click<8.2",  # typer 0.12, which it pins, fails with later ones
)  # fmt: skip
MOSEC: Final = ("mosec==0.9.8", "numpy>=2,<3", "pillow", "tokenizers")
OPENVINO: Final = ("openvino>=2026,<2027", "nncf>=3,<4", "numpy>=2,<3", "pillow", "tokenizers")
_DATA_URI: Final = ('"data:image/jpeg;base64,', '"')
_STRING: Final = ('"', '"')


def openai_template(kind: Modality) -> BodyTemplate:
    """OpenAI's embeddings, with Infinity's ``modality``. Vectors come in base64, as OpenAI's own clients request."""
    before = f'{{"model":"clip","modality":"{kind}","encoding_format":"base64","input":['
    return BodyTemplate(before, _DATA_URI if kind == "image" else _STRING, "]}")


class Peer(ABC):
    """A server that has the base's weights."""

    name: ClassVar[str]

    def __init__(self, base: ClipBase, cache: Path, folder: Path) -> None:
        """Install what is missing in ``cache`` (kept), and start. ``folder``: for models and logs of this run.

        Raises:
            BaseModelError: it cannot load this base.
            RatchetError: it cannot be installed.
        """
        self.port = free_port()
        self.process = self.start(base, cache, folder)

    @abstractmethod
    def start(self, base: ClipBase, cache: Path, folder: Path) -> PeerProcess:
        """Start it on :attr:`port`."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until it answers. Raises RatchetError."""

    @abstractmethod
    def url(self, kind: Modality) -> str:
        """URL for inputs of a kind."""

    def kinds(self) -> tuple[Modality, ...]:
        return ("image", "text")


class Infinity(Peer):
    """infinity_emb with its torch engine and its own defaults, without telemetry."""

    name = "infinity"

    def start(self, base: ClipBase, cache: Path, folder: Path) -> PeerProcess:
        model = write_hf_clip(base, folder / "hf-clip")
        python = Environment(self.name, (*INFINITY, *same_torch())).ensure(cache)
        command = [
            str(python.with_name("infinity_emb")), "v2", "--model-id", str(model), "--served-model-name", "clip",
            "--engine", "torch", "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
        return PeerProcess(command, quiet, folder / "infinity.log")

    def wait(self) -> None:
        self.process.wait_for(f"http://127.0.0.1:{self.port}/health")

    def url(self, kind: Modality) -> str:
        return f"http://127.0.0.1:{self.port}/embeddings"


class Mosec(Peer):
    """mosec with dynamic batches through ONNX Runtime (:mod:`benchmarks.encode.peers.mosec_server`)."""

    name = "mosec"

    def start(self, base: ClipBase, cache: Path, folder: Path) -> PeerProcess:
        self.model = export_onnx(base, folder / "onnx")
        runtime = "onnxruntime-gpu" if torch.cuda.is_available() else "onnxruntime"
        python = Environment(self.name, (*MOSEC, runtime)).ensure(cache)
        script = Path(__file__).with_name("mosec_server.py")
        command = [str(python), str(script), "--address", "127.0.0.1", "--port", str(self.port)]
        command += ["--timeout", "300000", "--capacity", "4096"]
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"CLIP_FOLDER": str(self.model), "CLIP_THREADS": str(threads)}
        return PeerProcess(command, environment, folder / "mosec.log")

    def wait(self) -> None:
        self.process.wait_for(f"http://127.0.0.1:{self.port}/metrics")

    def url(self, kind: Modality) -> str:
        return f"http://127.0.0.1:{self.port}/{kind}"

    def kinds(self) -> tuple[Modality, ...]:
        return ("image", "text") if (self.model / "text.onnx").is_file() else ("image",)


PEERS: Final[dict[str, type[Peer]]] = {peer.name: peer for peer in (Infinity, Mosec)}
OPENVINO_RAW: Final = "openvino-raw"
TEXTS: Final = 4096
"""Texts that OpenVINO's loop takes in turns; it has no cache."""


def openvino_raw(base: ClipBase, precision: Precision, cache: Path, folder: Path) -> LineWorker:
    """OpenVINO in a loop, without a server (:mod:`benchmarks.encode.peers.openvino_raw`), in ``precision``. Raises
    BaseModelError, RatchetError as :class:`Peer`."""
    model = export_onnx(base, folder / "onnx")
    for number, jpeg in enumerate(jpegs()):
        (model / f"{number:02d}.jpg").write_bytes(jpeg)
    (model / "texts.txt").write_text("\n".join(map(text, range(TEXTS))))
    python = Environment(OPENVINO_RAW, OPENVINO).ensure(cache)
    return LineWorker(str(Path(__file__).with_name("openvino_raw.py")), str(model), precision, python=str(python))
