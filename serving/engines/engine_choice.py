"""Chooses the engine and precision of a base: from the settings, or for ``auto`` by measuring, because CPU flags are
not enough. Candidates run the same inputs in turns; one that is clearly faster than torch in float32, with vectors
within noise of it, is taken. Results are kept in ``home/engines`` by base, processor and versions, so that the gate and
all encoders of a machine choose alike. Small bases are not measured."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from core.digests import digest12, digest_json
from core.files import replace_file
from core.settings.serving import Serve
from serving.engines.backends import (
    FLOAT32,
    GOLDEN_TEXTS,
    Backend,
    EngineChoice,
    EngineName,
    Precision,
    Towers,
    golden_pixels,
    processor,
)
from serving.engines.clip_base import ClipBase, Tower
from serving.engines.tokens import pad_rows
from serving.engines.towers import TextWidths

log = logging.getLogger("ratchet.engine")

MIN_COSINE: Final = 0.999
"""Cosine of a golden vector with float32's; bfloat16 gives 0.9999 for ViT-B-32. The gate rejects a candidate whose
served vectors differ by more from the trainer's float32 ones (``updater.gate.checks.PARITY``)."""
MIN_GAIN: Final = 1.1
"""Smallest speedup over float32 that counts; below it, differences are mostly noise."""
SMALL_BYTES = 200_000_000
"""Weight bytes of a base below which there is little to gain: a pass takes a few milliseconds."""
WORKLOADS: Final[Sequence[tuple[Tower, int]]] = (("image", 8), ("text", 16), ("image", 1), ("text", 1))
"""Items of a full batch, and of a single request."""
ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    choice: EngineChoice
    seconds: tuple[float, ...] = ()
    """Fastest of all rounds, for each of :data:`WORKLOADS`."""
    cosine: float = 1.0
    """Smallest cosine between a golden vector and float32's."""
    error: str = ""
    """Reason why it cannot run; empty if it can."""

    def rate(self, workload: int) -> float:
        return WORKLOADS[workload][1] / self.seconds[workload]

    def speed_over(self, other: Measurement) -> float:
        """Speedup over another candidate: geometric mean over the workloads."""
        return float(np.exp(np.mean(np.log(other.seconds) - np.log(self.seconds))))

    @property
    def usable(self) -> bool:
        return not self.error and self.cosine >= MIN_COSINE

    def __str__(self) -> str:
        if self.error:
            return f"{self.choice}: {self.error}"
        rates = ", ".join(f"{self.rate(n):.1f} {kind}s/s by {count}" for n, (kind, count) in enumerate(WORKLOADS))
        return f"{self.choice}: {rates}, cosine to float32 {self.cosine:.5f}"


def choose_engine(base: ClipBase, serve: Serve, home: Path, device: torch.device) -> EngineChoice:
    """Choose the engine of ``base`` on ``device``. Measures once per base and machine, with torch's current threads."""
    candidates = possible(base, serve, device)
    if len(candidates) == 1:
        return candidates[0]
    path = home / "engines" / f"{base.digest[:12]}-{_machine(candidates, device)}.json"
    with _locked(path):
        try:
            known = json.loads(path.read_text())
            return EngineChoice(known["engine"], known["precision"])
        except (OSError, ValueError, KeyError, TypeError):
            measurements = measure(base, candidates, device)
        choice = best_of(measurements)
        log.info("%s runs with %s: %s", base.name, choice, "; ".join(map(str, measurements)))
        found = asdict(choice) | {"measured": [asdict(row) for row in measurements]}
        try:
            replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        except OSError as error:
            log.warning("%s cannot be written (%s): the next process measures again", path, error)
    return choice


def possible(base: ClipBase, serve: Serve, device: torch.device) -> list[EngineChoice]:
    """The choices that the settings allow, the default first. On a GPU ``auto`` means torch: TensorRT takes minutes."""
    small = base.weights_bytes < SMALL_BYTES
    names, precisions = _installed(), _precisions(device)
    if serve.engine != "auto":
        names = [serve.engine]  # if it is not installed, making it raises
    elif small or device.type == "cuda":
        names = ["torch"]
    if serve.precision != "auto":
        precisions = [serve.precision]
    elif small:
        precisions = ["float32"]
    return [EngineChoice(name, precision) for name in names for precision in precisions]


def all_choices(device: torch.device) -> list[EngineChoice]:
    """Every installed engine, in float32 and in the processor's half precision; torch first."""
    return [EngineChoice(name, precision) for name in _installed() for precision in _precisions(device)]


def _installed() -> list[EngineName]:
    return ["torch", "onnx"] if find_spec("onnx") and find_spec("onnxruntime") else ["torch"]


def _precisions(device: torch.device) -> list[Precision]:
    half = processor(device.type).half
    return ["float32"] if half is None else ["float32", half]


def best_of(measurements: Sequence[Measurement]) -> EngineChoice:
    """The first usable choice, unless another one is clearly faster. Ties go to torch, the first: adapters share
    weights there and need no compilation."""
    usable = [row for row in measurements if row.usable]
    if not usable:
        return FLOAT32
    best = usable[0]
    for engine in dict.fromkeys(row.choice.engine for row in usable):
        fastest = max((row for row in usable if row.choice.engine == engine), key=lambda row: row.speed_over(best))
        best = fastest if fastest.speed_over(best) >= MIN_GAIN else best
    return best.choice


def measure(base: ClipBase, candidates: Sequence[EngineChoice], device: torch.device) -> list[Measurement]:
    """Run every candidate in turns on golden inputs. Exceptions of a candidate are reported in its measurement."""
    model, tokenizer = base.build_model(), base.tokenizer()
    rows = tokenizer.rows(list(GOLDEN_TEXTS))
    width = TextWidths.prove(model, tokenizer, base.context_length).width(max(map(len, rows)))
    ids = pad_rows(rows, width, tokenizer.pad_id)
    pixels = golden_pixels(base.preprocess.size)
    golden: dict[Tower, Any] = {"image": pixels, "text": ids}
    inputs = [golden[kind][np.arange(count) % len(golden[kind])] for kind, count in WORKLOADS]
    plain = make_backend(FLOAT32, base, model, torch.device("cpu")).towers({})
    reference = _vectors(plain, pixels, ids)
    towers: dict[EngineChoice, Towers] = {}
    results: dict[EngineChoice, Measurement] = {}
    for choice in candidates:
        try:
            is_plain = choice == FLOAT32 and device.type == "cpu"  # built already, with packed weights
            towers[choice] = plain if is_plain else make_backend(choice, base, model, device).towers({})
            cosine = _least_cosine(_vectors(towers[choice], pixels, ids), reference)
            results[choice] = Measurement(choice, (float("inf"),) * len(WORKLOADS), cosine)
        except Exception as error:  # libraries raise anything: the candidate is out
            towers.pop(choice, None)
            results[choice] = Measurement(choice, error=f"{type(error).__name__}: {error}"[:300])
    for _ in range(ROUNDS):
        for choice, tower in towers.items():
            seconds = [_seconds(tower, kind, items) for (kind, _), items in zip(WORKLOADS, inputs, strict=True)]
            fastest = tuple(map(min, results[choice].seconds, seconds))
            results[choice] = replace(results[choice], seconds=fastest)
    return [results[choice] for choice in candidates]


def make_backend(choice: EngineChoice, base: ClipBase, model: Any, device: torch.device) -> Backend:
    """Make the backend of a choice. ``model``: the base in float32 on the CPU; for torch in float32 it moves to
    ``device``. Raises ConfigError when the engine is not installed."""
    if choice.engine == "onnx":
        from serving.engines.onnx_backend import OnnxBackend

        return OnnxBackend(base, model, device, choice.precision)
    from serving.engines.torch_backend import TorchBackend

    moved = model.to(device) if choice.precision == "float32" else model
    return TorchBackend(moved, base.preprocess, device, choice.precision)


def _vectors(towers: Towers, pixels: np.ndarray, ids: torch.Tensor) -> np.ndarray:
    return np.concatenate([towers.images(pixels), towers.texts(ids)])


def _least_cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    cosines = (vectors * reference).sum(axis=1) / np.maximum(lengths, 1e-12)
    return float(cosines.min()) if np.isfinite(cosines).all() else -1.0


def _seconds(towers: Towers, kind: Tower, items: Any) -> float:
    began = time.perf_counter()
    towers.images(items) if kind == "image" else towers.texts(items)
    return time.perf_counter() - began


def _machine(candidates: Sequence[EngineChoice], device: torch.device) -> str:
    """12 hex digits of everything that a measurement depends on."""
    about = {
        "processor": asdict(processor(device.type)),
        "candidates": [str(choice) for choice in candidates],
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "onnxruntime", "onnxruntime-ep-openvino")},
    }
    return digest12(digest_json(about))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process measure while others wait. If the lock cannot be written, each measures for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
