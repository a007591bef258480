"""Which engine and precision a base runs with: what the settings say, and where they say ``auto``, what is measured.

Flags of a processor are no measurement: one with AVX512-BF16 and without AMX may multiply bfloat16 slower than float32.
Candidates run the same images and texts in turns; one that is clearly faster than float32, and whose vectors stay
within noise of it, is taken. The result is kept in ``home/engines`` by base, processor and versions, so that the gate
and every encoder of a machine take the same.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from ops.digests import digest12, digest_json
from ops.settings import Serve
from serving.engines.backends import FLOAT32, Backend, EngineChoice, EngineName, Precision, Towers
from serving.engines.base import ClipBase
from serving.engines.conv_layout import ROWS
from serving.engines.golden_inputs import GOLDEN_TEXTS, golden_pixels
from serving.engines.processor import processor
from serving.engines.text_tower import TextWidths
from serving.engines.tokens import pad_rows

log = logging.getLogger("ratchet.engine")

MIN_COSINE: Final = 0.999
"""Of a golden vector with its float32 twin; bfloat16 gives 0.9999 for ViT-B-32. The gate rejects a candidate whose
served vectors are further than this from the trainer's, which are float32 (parity, ``updater.gate.checks.Limits``)."""
MIN_GAIN: Final = 1.15
"""Speed over float32 that pays for the precision: below it, what is measured is mostly noise."""
IMAGES: Final = 8
TEXTS: Final = 16
ROUNDS: Final = 3


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate on this machine. Seconds are the fastest of all rounds."""

    choice: EngineChoice
    image_seconds: float = 0.0
    """Of :data:`IMAGES` images in one pass."""
    text_seconds: float = 0.0
    """Of :data:`TEXTS` texts in one pass."""
    cosine: float = 1.0
    """Smallest cosine of a golden vector with float32's."""
    error: str = ""
    """Why it cannot run; empty when it can."""

    @property
    def seconds(self) -> float:
        """Of one pass of each tower."""
        return self.image_seconds + self.text_seconds

    @property
    def usable(self) -> bool:
        """Whether it runs, and its vectors are within noise of float32's."""
        return not self.error and self.cosine >= MIN_COSINE


def choose_engine(base: ClipBase, serve: Serve, home: Path, device: torch.device) -> EngineChoice:
    """The engine of ``base`` on ``device``. Measures once for a base and a machine, with torch's present threads."""
    candidates = possible(serve, device)
    if len(candidates) == 1:
        return candidates[0]
    path = home / "engines" / f"{base.digest[:12]}.json"
    key = _machine(candidates, device)
    with _locked(path):
        known: dict[str, Any] = _read(path)
        if key in known:
            return EngineChoice(known[key]["engine"], known[key]["precision"])
        measurements = measure(base, candidates, device)
        choice = best_of(measurements)
        log.info("%s runs with %s: %s", base.name, choice, "; ".join(map(describe, measurements)))
        known[key] = asdict(choice) | {"measured": [asdict(row) for row in measurements]}
        _write(path, known)
    return choice


def possible(serve: Serve, device: torch.device) -> list[EngineChoice]:
    """What the settings leave open, the default first. An engine ``auto`` is torch: a graph takes seconds to export."""
    engine: EngineName = "torch" if serve.engine == "auto" else serve.engine
    if serve.precision != "auto":
        return [EngineChoice(engine, serve.precision)]
    half = processor(device.type).half
    precisions: list[Precision] = ["float32"] if half is None else ["float32", half]
    return [EngineChoice(engine, precision) for precision in precisions]


def best_of(measurements: Sequence[Measurement]) -> EngineChoice:
    """The fastest that is usable; the first one, unless another is clearly faster."""
    usable = [row for row in measurements if row.usable]
    if not usable:
        return FLOAT32
    fastest = min(usable, key=lambda row: row.seconds)
    return fastest.choice if fastest.seconds * MIN_GAIN <= usable[0].seconds else usable[0].choice


def measure(base: ClipBase, candidates: Sequence[EngineChoice], device: torch.device) -> list[Measurement]:
    """Run every candidate in turns on golden inputs. One that raises is reported, not raised."""
    model, tokenizer = base.build_model(), base.tokenizer()
    rows = tokenizer.rows(list(GOLDEN_TEXTS))
    width = TextWidths.prove(model, tokenizer, base.context_length).width(max(map(len, rows)))
    ids = pad_rows(rows, width, tokenizer.pad_id)
    pixels = golden_pixels(base.preprocess.size)
    many_pixels = np.concatenate([pixels] * (IMAGES // len(pixels)))
    many_ids = ids.repeat(TEXTS // len(ids), 1)
    reference = _vectors(make_backend(FLOAT32, base, model, torch.device("cpu")).towers({}), pixels, ids)
    towers: dict[EngineChoice, Towers] = {}
    results: dict[EngineChoice, Measurement] = {}
    for choice in candidates:
        try:
            towers[choice] = make_backend(choice, base, model, device).towers({})
            cosine = _least_cosine(_vectors(towers[choice], pixels, ids), reference)
            results[choice] = Measurement(choice, float("inf"), float("inf"), cosine)
        except Exception as error:  # whatever a library raises: this candidate is out
            towers.pop(choice, None)
            results[choice] = Measurement(choice, error=f"{type(error).__name__}: {error}"[:300])
    for _ in range(ROUNDS):
        for choice, tower in towers.items():
            before = results[choice]
            image_seconds = min(before.image_seconds, _seconds(lambda tower=tower: tower.images(many_pixels)))
            text_seconds = min(before.text_seconds, _seconds(lambda tower=tower: tower.texts(many_ids)))
            results[choice] = Measurement(choice, image_seconds, text_seconds, before.cosine)
    return [results[choice] for choice in candidates]


def make_backend(choice: EngineChoice, base: ClipBase, model: Any, device: torch.device) -> Backend:
    """The backend of a choice. ``model``: the base in float32 on the CPU; in float32 it is moved to ``device``.

    Raises ConfigError when the engine is not installed.
    """
    if choice.engine == "onnx":
        from serving.engines.onnx_backend import OnnxBackend

        return OnnxBackend(base, model, device, choice.precision)
    from serving.engines.torch_backend import TorchBackend

    moved = model.to(device) if choice.precision == "float32" else model
    return TorchBackend(moved, base.preprocess, device, choice.precision)


def describe(row: Measurement) -> str:
    """One line for people."""
    if row.error:
        return f"{row.choice}: {row.error}"
    return (
        f"{row.choice}: {IMAGES / row.image_seconds:.1f} images/s, {TEXTS / row.text_seconds:.1f} texts/s, "
        f"cosine to float32 {row.cosine:.5f}"
    )


def _vectors(towers: Towers, pixels: np.ndarray, ids: torch.Tensor) -> np.ndarray:
    assert len(ids) <= ROWS
    return np.concatenate([towers.images(pixels), towers.texts(ids)])


def _least_cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    cosines = (vectors * reference).sum(axis=1) / np.maximum(lengths, 1e-12)
    return float(cosines.min()) if np.isfinite(cosines).all() else -1.0


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _machine(candidates: Sequence[EngineChoice], device: torch.device) -> str:
    """What a measurement holds for."""
    return digest12(
        digest_json(
            {
                "processor": asdict(processor(device.type)),
                "candidates": [str(choice) for choice in candidates],
                "threads": torch.get_num_threads(),
                "versions": {name: _version(name) for name in ("torch", "onnxruntime", "onnxruntime-ep-openvino")},
            }
        )
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process measures, the others wait for it. Where nothing can be written each measures for itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    work = path.with_suffix(".new")
    try:
        work.write_text(json.dumps(value, indent=1) + "\n")
        work.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", path, error)
