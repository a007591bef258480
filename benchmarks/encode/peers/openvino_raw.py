"""OpenVINO without a server: both towers' graphs in a loop, preceded by the decoding of mosec's workers. Runs in an
environment of its own, without Ratchet.

    python openvino_raw.py FOLDER PRECISION

``FOLDER``: what :func:`benchmarks.encode.peers.onnx_export.export_onnx` wrote, with pictures ``*.jpg`` and lines of
text in ``texts.txt``. ``PRECISION``: ``int8`` quantizes weights and activations with NNCF, calibrated on these inputs;
otherwise float32 or bfloat16. The lines are those of :mod:`benchmarks.encode.raw`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import numpy.typing as npt
import openvino
from decoding import pixels  # in this folder
from tokenizers import Tokenizer

CALIBRATION = 64
"""Inputs of each kind that NNCF measures activations on."""


class OpenVinoLoop:
    def __init__(self, folder: Path, precision: str) -> None:
        self.about = json.loads((folder / "model.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.about["context_length"])
        self._jpegs = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
        self._texts = (folder / "texts.txt").read_text().splitlines()
        threads = len(os.sched_getaffinity(0))
        self._decoding = ThreadPoolExecutor(threads)
        self._inputs: dict[str, Callable[[range], npt.NDArray[Any]]] = {"image": self.images, "text": self.texts}
        core = openvino.Core()
        hints = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads)}
        if precision != "int8":
            hints["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bfloat16" else "f32"
        self._compiled = {}
        for kind, inputs in self._inputs.items():
            if (folder / f"{kind}.onnx").is_file():
                graph = core.read_model(folder / f"{kind}.onnx")
                if precision == "int8":
                    items = nncf.Dataset([inputs(range(number, number + 1)) for number in range(CALIBRATION)])
                    graph = nncf.quantize(graph, items, model_type=nncf.ModelType.TRANSFORMER)
                self._compiled[kind] = core.compile_model(graph, "CPU", hints)

    def images(self, numbers: range) -> npt.NDArray[Any]:
        encoded = [self._jpegs[number % len(self._jpegs)] for number in numbers]
        return np.stack(list(self._decoding.map(lambda each: pixels(each, self.about), encoded)))

    def texts(self, numbers: range) -> npt.NDArray[Any]:
        ids = np.zeros((len(numbers), self.about["context_length"]), np.int64)
        texts = [self._texts[number % len(self._texts)] for number in numbers]
        for target, each in zip(ids, self.tokenizer.encode_batch(texts), strict=True):
            target[: len(each.ids)] = each.ids
        return ids

    def run(self, kind: str, batch: int, seconds: float) -> dict[str, float]:
        """Run batches for about this many seconds, after one that is not counted."""
        starts = count(0, batch)
        self.encode(kind, range(batch))
        began, items = time.perf_counter(), 0
        while time.perf_counter() - began < seconds or not items:
            first = next(starts)
            self.encode(kind, range(first, first + batch))
            items += batch
        return {"items": items, "seconds": time.perf_counter() - began}

    def encode(self, kind: str, numbers: range) -> npt.NDArray[Any]:
        """Unit vectors, float32 [n, dim]."""
        vectors: npt.NDArray[Any] = self._compiled[kind](self._inputs[kind](numbers))[0]
        return vectors

    def kinds(self) -> list[str]:
        return list(self._compiled)


def main(folder: Path, precision: str) -> None:
    loop = OpenVinoLoop(folder, precision)
    for question in map(json.loads, sys.stdin):
        if question.get("describe"):
            answered: dict[str, Any] = {"kinds": loop.kinds(), "version": openvino.__version__}
        elif "vectors" in question:
            answered = {"vectors": loop.encode(question["kind"], range(question["vectors"])).tolist()}
        else:
            answered = loop.run(question["kind"], question["batch"], question["seconds"])
        print(json.dumps(answered), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
