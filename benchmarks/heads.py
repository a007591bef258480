"""``ratchet bench heads``: accuracy of heads compared with prompts and a trained adapter, on labelled domains.

For each domain with labels: prompts on the base, the nearest class mean and a head on the base's features, then the
same on those of an adapter that the default recipe has trained on the domain; all from the same pairs, on held-out
pictures. And of each head: the share of its own classes' pictures that it takes for known, the share of other domains'
that it assigns to no class, and its calibration error (ECE, 10 bins).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.command import show_table
from benchmarks.continual.evaluation import Encoded, Evaluator, images_of
from benchmarks.continual.nearest import NearestMean
from benchmarks.continual.plan import draw, plan
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import Stream, Suite, load_stream, prepare
from benchmarks.machine import machine
from core.progress import progress_log
from core.settings import Settings
from serving.engines.clip_base import ClipBase, load_base
from serving.engines.heads import Head
from updater.data.pools import Pair
from updater.heads import LEAST, fit_head
from updater.recipes import load_recipe
from updater.training.result import Limits
from updater.training.train import train

BINS = 10
Vectors = NDArray[np.float32]


def run(settings: Settings, protocol: Protocol) -> dict[str, Any]:
    """The figures. Raises PackageError when data cannot be obtained."""
    prepare(settings.home)
    stream = load_stream(settings.home, protocol)
    base = load_base(settings.home, settings.base.clip)
    suites = [suite for suite in stream.suites if suite.named and suite.name in stream.updates]
    taught = {suite.name: _learnable(stream.updates[suite.name]) for suite in suites}
    evaluator = Evaluator(base, suites)
    encoded = evaluator.encode(None)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="ratchet-heads-") as folder:
        for suite in suites:
            progress_log.info(f"{suite.name}: {len(taught[suite.name])} labelled pairs")
            began = time.process_time()
            directory = _trained(base, stream, suite, protocol, Path(folder) / suite.name)
            trained = time.process_time() - began
            adapted = evaluator.encode(directory)
            rows[suite.name] = {
                "classes": len({pair.label for pair in suite.items}),
                "items": len(suite.items),
                "learned_from": len(taught[suite.name]),
                **_side("base", suite, suites, encoded, _features(base, taught[suite.name], None), taught[suite.name]),
                **_side(
                    "adapter",
                    suite,
                    suites,
                    adapted,
                    _features(base, taught[suite.name], directory),
                    taught[suite.name],
                ),
                "adapter_seconds": round(trained, 1),
            }
    return {"suites": rows, "base": base.name, "gflops": protocol.gflops, "machine": machine()}


def _learnable(pairs: Sequence[Pair]) -> list[Pair]:
    counts = Counter(pair.label for pair in pairs if pair.label)
    return [pair for pair in pairs if counts[pair.label] >= LEAST]


def _trained(base: ClipBase, stream: Stream, suite: Suite, protocol: Protocol, folder: Path) -> Path:
    recipe = plan(base, load_recipe("default"), stream, protocol, folder / "plans").recipe
    pools = draw(stream, [suite.name], 0, recipe, protocol, seed=0)
    limits = Limits(protocol.gflops, 3600.0, threads=1)
    result = train(
        base, recipe, pools, None, seed=0, limits=limits, out_dir=folder / "adapters", work_dir=folder / "work",
        device="cpu",
    )  # fmt: skip
    return result.directory


def _features(base: ClipBase, pairs: Sequence[Pair], adapter: Path | None) -> Vectors:
    """Vectors of training pictures, [n, dim]."""
    suite = Suite("taught", "adaptation", "classification", tuple(pairs), ("{}",))
    return images_of(suite, Evaluator(base, [suite]).encode(adapter))


def _side(
    name: str, suite: Suite, suites: Sequence[Suite], encoded: Encoded, features: Vectors, pairs: Sequence[Pair]
) -> dict[str, float]:
    labels = [pair.label for pair in pairs]
    right = np.array([pair.label for pair in suite.items])
    x = images_of(suite, encoded)
    began = time.process_time()
    head = fit_head(features, labels)
    seconds = time.process_time() - began
    means = NearestMean()
    means.update(features, labels)
    answers = head.classify(x)
    chosen = np.array(head.labels)[answers.probabilities.argmax(axis=1)]
    strangers = [images_of(other, encoded) for other in suites if other.name != suite.name]
    return {
        f"prompts_{name}": _percent(_prompted(suite, encoded) == right),
        f"nearest_{name}": _percent(np.array(means.predict(x)) == right),
        f"head_{name}": _percent(chosen == right),
        f"known_{name}": _percent(answers.distance <= 1),
        f"strangers_{name}": _percent(head.classify(np.concatenate(strangers)).distance > 1),
        f"ece_{name}": round(100 * _calibration_error(head, x, right), 1),
        f"fit_seconds_{name}": round(seconds, 2),
    }


def _prompted(suite: Suite, encoded: Encoded) -> NDArray[np.str_]:
    classes = sorted({pair.label for pair in suite.items})
    heads = np.stack([
        np.mean([encoded.texts[template.replace("{}", name)] for template in suite.templates], axis=0)
        for name in classes
    ])  # fmt: skip
    chosen: NDArray[np.str_] = np.array(classes)[(images_of(suite, encoded) @ heads.T).argmax(axis=1)]
    return chosen


def _calibration_error(head: Head, x: Vectors, right: NDArray[np.str_]) -> float:
    """Expected calibration error (Guo et al. 2017): how far confidence is from accuracy, in bins of confidence."""
    shares = head.classify(x).probabilities
    sure, hits = shares.max(axis=1), np.array(head.labels)[shares.argmax(axis=1)] == right
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs(sure[place == b].sum() - hits[place == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(x))


def _percent(hits: NDArray[np.bool_]) -> float:
    return round(100 * float(np.mean(hits)), 1)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ratchet bench heads", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1000, help="labelled pairs of each domain, at most (1000)")
    parser.add_argument("--gflops", type=float, default=640.0, help="memory-adjusted GFLOPs of each adapter (640)")
    options = parser.parse_args(arguments)
    figures = run(settings, Protocol(new=options.pairs, gflops=options.gflops))
    table = Table("domain", "classes", "model", "prompts", "nearest mean", "head", "known", "strangers", "ECE")
    for name, row in figures["suites"].items():
        for model in ("base", "adapter"):
            keys = ("prompts", "nearest", "head", "known", "strangers", "ece")
            table.add_row(name, str(row["classes"]), model, *(f"{row[f'{key}_{model}']:.1f}" for key in keys))
    show_table(table, figures)
