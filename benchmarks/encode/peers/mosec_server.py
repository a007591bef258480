"""A mosec server with ONNX Runtime sessions of both towers. Runs in mosec's environment, without Ratchet.

    CLIP_FOLDER=... CLIP_THREADS=2 python mosec_server.py --port 8001 --address 127.0.0.1

Two stages a route: images are decoded, or texts tokenized, in as many processes as there are threads; then whole
batches go through a session. ``/image`` and ``/text`` take and return the JSON of OpenAI's embeddings, with vectors in
base64.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from decoding import pixels  # in this folder
from mosec import Runtime, Server, Worker
from tokenizers import Tokenizer

FOLDER = Path(os.environ["CLIP_FOLDER"])
THREADS = int(os.environ["CLIP_THREADS"])
ABOUT = json.loads((FOLDER / "model.json").read_text())
BATCH = 32
"""Requests of a dynamic batch, and inputs of one run of a session."""
WAIT_MS = 5
TIMEOUT_SECONDS = 300


class Decode(Worker):  # type: ignore[misc]
    """Data URIs to uint8 [n, size, size, 3]."""

    def deserialize(self, data: bytes) -> list[Any]:
        inputs: list[Any] = json.loads(data)["input"]
        return inputs

    def forward(self, data: list[Any]) -> npt.NDArray[Any]:
        return np.stack([pixels(base64.b64decode(uri.partition(",")[2]), ABOUT) for uri in data])


class Tokenize(Worker):  # type: ignore[misc]
    """Texts to lists of token IDs."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(ABOUT["context_length"])

    def deserialize(self, data: bytes) -> list[Any]:
        inputs: list[Any] = json.loads(data)["input"]
        return inputs

    def forward(self, data: list[Any]) -> list[Any]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(data)]


class Session(Worker):  # type: ignore[misc]
    """Batches through a graph; each request gets its rows."""

    graph = ""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        providers = onnxruntime.get_available_providers()
        wanted = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in providers]
        self.session = onnxruntime.InferenceSession(str(FOLDER / self.graph), options, providers=wanted)
        self.input = self.session.get_inputs()[0].name

    def forward(self, data: list[Any]) -> list[Any]:
        rows = [row for request in data for row in request]
        vectors = np.concatenate([self._run(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)])
        ends = np.cumsum([len(request) for request in data])
        return np.split(vectors, ends[:-1])

    def _run(self, rows: list[Any]) -> npt.NDArray[Any]:
        vectors: npt.NDArray[Any] = self.session.run(None, {self.input: self.batch(rows)})[0]
        return vectors

    def batch(self, rows: list[Any]) -> npt.NDArray[Any]:
        raise NotImplementedError

    def serialize(self, data: npt.NDArray[Any]) -> bytes:
        encoded = (base64.b64encode(row.astype("<f4").tobytes()).decode() for row in data)
        rows = [{"object": "embedding", "index": index, "embedding": text} for index, text in enumerate(encoded)]
        return json.dumps({"object": "list", "data": rows, "model": "clip"}).encode()


class ImageSession(Session):
    graph = "image.onnx"

    def batch(self, rows: list[Any]) -> npt.NDArray[Any]:
        return np.stack(rows)


class TextSession(Session):
    graph = "text.onnx"

    def batch(self, rows: list[Any]) -> npt.NDArray[Any]:
        ids = np.zeros((len(rows), ABOUT["context_length"]), np.int64)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = row
        return ids


def main() -> None:
    routes = {
        route: [
            Runtime(first, num=THREADS, timeout=TIMEOUT_SECONDS),
            Runtime(second, max_batch_size=BATCH, max_wait_time=WAIT_MS, timeout=TIMEOUT_SECONDS),
        ]
        for route, first, second in (("/image", Decode, ImageSession), ("/text", Tokenize, TextSession))
        if (FOLDER / second.graph).is_file()
    }
    server = Server()
    server.register_runtime(routes)
    server.run()


if __name__ == "__main__":
    main()
