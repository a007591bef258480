"""``ratchet bench families``: the VLM families that Ratchet can add, train, serve and judge, by small random models.

Each family is a real configuration of its own classes and processor with random weights. It goes through the same steps
as your own model: `base add`, a few steps of an update, both engines, an adapter loaded and unloaded between answers,
and a run of the gate, whose parity check compares trainer and engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import pyarrow as pa
from rich.table import Column, Table

from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.errors import ConfigError, RatchetError
from core.progress import step
from core.settings import Settings
from core.settings.serving import Serve
from core.settings.updates import Gate
from serving.engines.vlm.generation import GenerationRequest, question
from serving.engines.vlm.open import SyncVlm, open_engine
from serving.engines.vlm.vllm_engine import VllmEngine
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.colour_squares import colour_of, encoded_square, square
from tests.support.vlm_families import FAMILIES, write_family
from updater.bases.register import add_vlm
from updater.data.pools import Pools, Question
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.run import run_gate
from updater.gate.sample_suites import fresh_suites
from updater.gate.vlm import VlmEvaluator
from updater.recipes import load_recipe
from updater.training.result import Limits
from updater.training.train import train

ASKED: Final = "which colour?"
STEPS, BATCH, PICTURES, ASKS = 12, 8, 48, 12
SERVE: Final = Serve(vlm_memory_gib=0.2, vlm_max_tokens=16, vlm_context=512)
GATE: Final = Gate(min_items=20, margin=0.3, detect=0.5)
SECONDS: Final = 600.0
"""Of one family; vLLM takes half a minute of it to start."""


def run(names: Sequence[str]) -> dict[str, Any]:
    """Try these families, each in its own process. Returns the figures."""
    rows = []
    for name in names:
        with step(name):
            command = [sys.executable, "-m", "benchmarks.families", "--one", name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
            except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
                rows.append({"family": name, "problems": [f"{type(error).__name__}: {str(error)[:200]}"]})
    whole = [row["family"] for row in rows if not row["problems"]]
    return {"families": rows, "whole": whole, "machine": machine()}


def try_family(name: str, folder: Path) -> dict[str, Any]:
    """The capabilities of one family; failures are in ``problems``."""
    found: dict[str, Any] = {"family": name, "problems": []}
    steps = (_added, _trained, partial(_served, kind="transformers"), partial(_served, kind="vllm"))
    for each in steps:
        try:
            found |= each(folder, found)
        except RatchetError as error:
            found["problems"].append(f"{type(error).__name__}: {error.message[:300]}")
        except Exception as error:  # of transformers, PEFT or vLLM: the finding of this benchmark
            found["problems"].append(f"{type(error).__name__}: {str(error)[:300]}")
    both = [found.pop(f"_{kind}", None) for kind in ("transformers", "vllm")]
    if all(both):
        same = [a == b for one, other in zip(*both, strict=True) for a, b in zip(one, other, strict=True)]
        found["answers_equal"] = round(sum(same) / len(same), 3)
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _added(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    write_family(found["family"], folder / "model")
    base = add_vlm(folder / "home", "tried", folder / "model")
    return {"architecture": base.architecture, "lora": sorted(base.lora_targets), "_base": base}


def _trained(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    recipe = load_recipe("vlm-default").model_copy(update={"max_steps": STEPS, "batch_size": BATCH})
    known = tuple(Question(f"q{n}", ASKED, colour_of(n), partial(encoded_square, n)) for n in range(PICTURES))
    result = train(
        found["_base"], recipe, Pools(known[::2], known[1::2], ()), None, seed=0,
        limits=Limits(gflops=1e9, seconds=300, threads=1, checkpoint_steps=STEPS), out_dir=folder / "adapters",
        work_dir=folder / "work", device="cpu",
    )  # fmt: skip
    return {"trained_steps": result.steps, "_adapter": result.directory}


def _no_clip() -> NoReturn:
    raise ConfigError("no suite of this benchmark needs a CLIP.")


def _served(folder: Path, found: dict[str, Any], kind: str) -> dict[str, Any]:
    base: VlmBase = found["_base"]
    engine = open_engine(base, SERVE, kind=kind)
    with SyncVlm(engine) as vlm:
        asks = [question(square(number), ASKED, max_tokens=8) for number in range(ASKS)]
        before = _answers(vlm, asks, None)
        values: dict[str, Any] = {f"{kind}_serves": True}
        adapter: Path | None = found.get("_adapter")
        after = None
        if adapter is not None:
            evaluator = VlmEvaluator(vlm, SERVE, _no_clip, cache=folder / f"cache-{kind}")
            evaluator.load(adapter.name, adapter)
            after = _answers(vlm, asks, adapter.name)
            values |= _judged(evaluator, adapter.name, kind)
            vlm.unload(adapter.name)
            if _answers(vlm, asks, None) != before:
                raise ConfigError("the base answers otherwise after an adapter was taken away.")
        if isinstance(engine, VllmEngine):
            values["not_by_vllm"] = sorted(engine.ignored_parts)
    return {**values, f"_{kind}": (before, after or before)}


def _judged(evaluator: VlmEvaluator, name: str, kind: str) -> dict[str, Any]:
    fresh = fresh_suites(_table(), _Pictures(), family="vlm")
    verdict = run_gate(
        evaluator=evaluator, candidate=name, incumbent=None, suites=[], fresh=fresh,
        plan=AnalysisPlan.alone(GATE.alpha), settings=GATE, meta={"rank": 8, "bytes": 50_000},
    )  # fmt: skip
    checks = {check.name: check for check in verdict.checks}
    failed = [f"{kind}: {check.name}: {check.detail}" for check in verdict.checks if not check.ok]
    if "parity" not in checks or not checks["parity"].ok:
        raise ConfigError("; ".join(failed) or "the gate compared nothing.")
    return {f"{kind}_parity": checks["parity"].value, f"{kind}_verdict": verdict.outcome}


def _answers(vlm: SyncVlm, asks: Sequence[GenerationRequest], adapter: str | None) -> list[list[int]]:
    return [list(reply.tokens) for reply in vlm.replies(asks, adapter, label="answers")]


class _Pictures:
    """Images of :func:`_table`."""

    def expect(self, ids: Sequence[str]) -> None:
        """Nothing to do: they are drawn on request."""

    def __call__(self, sample: str) -> bytes:
        return encoded_square(int(sample.removeprefix("new-")))


def _table() -> pa.Table:
    numbers = range(1000, 1000 + PICTURES)
    return pa.table(
        {
            "id": [f"new-{n}" for n in numbers], "text": [""] * PICTURES,
            "question": [ASKED] * PICTURES, "answer": [colour_of(n) for n in numbers], "domain": ["new"] * PICTURES,
            "concept": [""] * PICTURES,
        }
    )  # fmt: skip


def show(figures: dict[str, Any]) -> None:
    table = Table(Column("family", no_wrap=True), "LoRA in", "update", "transformers", "vLLM", "parity",
                  "answers equal", "not by vLLM",
                  "problems", title="VLM families, by small random models")  # fmt: skip
    for row in figures["families"]:
        parity = row.get("vllm_parity")
        table.add_row(
            row["family"], ", ".join(row.get("lora", ())), str(row.get("trained_steps", "-")),
            "yes" if row.get("transformers_serves") else "no", "yes" if row.get("vllm_serves") else "no",
            "-" if parity is None else f"{parity:.1e}", str(row.get("answers_equal", "-")),
            ", ".join(row.get("not_by_vllm", ())), "; ".join(row["problems"]),
        )  # fmt: skip
    show_table(table, figures)


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("families", __doc__)
    parser.add_argument("names", nargs="*", help=f"families, of {', '.join(FAMILIES)} (all)")
    names = parser.parse_args(arguments).names or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise ConfigError(f"there is no family {unknown[0]!r}.", f"There are: {', '.join(FAMILIES)}.")
    show(run(names))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as place:
        print(json.dumps(try_family(sys.argv[2], Path(place))), flush=True)
