"""Chooses the precision of a base's matrix products: from the settings, or for ``auto`` by measuring, because CPU flags
are not enough. Candidates run the same inputs in turns; one that is clearly faster than a more exact one, with vectors
within noise of float32's, is taken. Results are kept in ``home/engines`` by base, processor and versions, so that the
gate and all encoders of a machine choose alike. Small bases are not measured."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch

from core.digests import digest12, digest_json
from core.errors import ConfigError
from core.files import replace_file
from core.settings.serving import Serve
from serving.engines.clip_base import ClipBase, Tower
from serving.engines.processor import GOLDEN_TEXTS, Precision, golden_pixels, processor
from serving.engines.tokens import pad_rows
from serving.engines.torch_backend import TorchBackend, TorchTowers
from serving.engines.towers import TextWidths

log = logging.getLogger("ratchet.engine")

MIN_COSINE: Final = 0.999
"""Cosine of a golden vector with float32's; bfloat16 gives 0.9999 for ViT-B-32. The gate rejects a candidate whose
served vectors differ by more from the trainer's float32 ones (``updater.gate.checks.PARITY``)."""
MIN_GAIN: Final = 1.1
"""Smallest speedup over a more exact precision that counts; below it, differences are mostly noise."""
SMALL_BYTES = 200_000_000
"""Weight bytes of a base below which there is little to gain: a pass takes a few milliseconds."""
WORKLOADS: Final[Sequence[tuple[Tower, int]]] = (("image", 8), ("text", 16), ("image", 1), ("text", 1))
"""Items of a full batch, and of a single request."""
ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    precision: Precision
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
            return f"{self.precision}: {self.error}"
        rates = ", ".join(f"{self.rate(n):.1f} {kind}s/s by {count}" for n, (kind, count) in enumerate(WORKLOADS))
        return f"{self.precision}: {rates}, cosine to float32 {self.cosine:.5f}"


def choose_precision(base: ClipBase, serve: Serve, home: Path, device: torch.device) -> Precision:
    """The precision of ``base`` on ``device``. Measures once per base and machine, with torch's current threads."""
    if serve.precision != "auto":
        return serve.precision
    candidates = processor(device.type).precisions
    if base.weights_bytes < SMALL_BYTES or len(candidates) == 1:
        return "float32"
    path = home / "engines" / f"{base.digest[:12]}-{_machine(device)}.json"
    with _locked(path):
        try:
            known: Precision = json.loads(path.read_text())["precision"]
            if known in get_args(Precision):
                return known
        except (OSError, ValueError, KeyError, TypeError):
            pass
        measurements = measure(base, candidates, device)
        choice = best_of(measurements)
        log.info("%s runs in %s: %s", base.name, choice, "; ".join(map(str, measurements)))
        result = {"precision": choice, "measured": [asdict(row) for row in measurements]}
        try:
            replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
        except OSError as error:
            log.warning("%s cannot be written (%s): the next process measures again", path, error)
    return choice


def best_of(measurements: Sequence[Measurement]) -> Precision:
    """The first usable one, unless a later, less exact one is clearly faster."""
    best: Measurement | None = None
    for row in measurements:
        if row.usable and (best is None or row.speed_over(best) >= MIN_GAIN):
            best = row
    return "float32" if best is None else best.precision


def measure(base: ClipBase, candidates: Sequence[Precision], device: torch.device) -> list[Measurement]:
    """Run every candidate in turns on golden inputs. Exceptions of a candidate are reported in its measurement."""
    model, tokenizer = base.build_model(), base.tokenizer()
    rows = tokenizer.rows(list(GOLDEN_TEXTS))
    width = TextWidths.prove(model, tokenizer, base.context_length).width(max(map(len, rows)))
    ids = pad_rows(rows, width, tokenizer.pad_id)
    pixels = golden_pixels(base.preprocess.size)
    golden: dict[Tower, Any] = {"image": pixels, "text": ids}
    inputs = [golden[kind][np.arange(count) % len(golden[kind])] for kind, count in WORKLOADS]
    plain = make_backend("float32", base, model, torch.device("cpu")).towers({})
    reference = _vectors(plain, pixels, ids)
    towers: dict[Precision, TorchTowers] = {}
    results: dict[Precision, Measurement] = {}
    for each in candidates:
        try:
            is_plain = each == "float32" and device.type == "cpu"  # built already, with packed weights
            towers[each] = plain if is_plain else make_backend(each, base, model, device).towers({})
            cosine = _least_cosine(_vectors(towers[each], pixels, ids), reference)
            results[each] = Measurement(each, (float("inf"),) * len(WORKLOADS), cosine)
        except Exception as error:  # libraries raise anything: the candidate is out
            towers.pop(each, None)
            results[each] = Measurement(each, error=f"{type(error).__name__}: {error}"[:300])
    for _ in range(ROUNDS):
        for each, tower in towers.items():
            seconds = [_seconds(tower, kind, items) for (kind, _), items in zip(WORKLOADS, inputs, strict=True)]
            fastest = tuple(map(min, results[each].seconds, seconds))
            results[each] = replace(results[each], seconds=fastest)
    return [results[each] for each in candidates]


def make_backend(precision: Precision, base: ClipBase, model: Any, device: torch.device) -> TorchBackend:
    """Make the backend of a precision. ``model``: the base in float32 on the CPU; for float32 it moves to ``device``.
    Raises ConfigError for int8 on a GPU."""
    if precision == "int8" and device.type != "cpu":
        raise ConfigError("int8 is for processors only.", "Set serve.precision to auto, or to bfloat16.")
    return TorchBackend(model.to(device) if precision == "float32" else model, base.preprocess, device, precision)


def _vectors(towers: TorchTowers, pixels: np.ndarray, ids: torch.Tensor) -> np.ndarray:
    return np.concatenate([towers.images(pixels), towers.texts(ids)])


def _least_cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    cosines = (vectors * reference).sum(axis=1) / np.maximum(lengths, 1e-12)
    return float(cosines.min()) if np.isfinite(cosines).all() else -1.0


def _seconds(towers: TorchTowers, kind: Tower, items: Any) -> float:
    began = time.perf_counter()
    towers.images(items) if kind == "image" else towers.texts(items)
    return time.perf_counter() - began


def _machine(device: torch.device) -> str:
    """12 hex digits of everything that a measurement depends on."""
    about = {
        "processor": asdict(processor(device.type)), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    return digest12(digest_json(about))


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
