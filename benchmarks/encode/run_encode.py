"""``ratchet bench encode``: embeddings a second, compared with other servers and with the model alone.

A model with random weights (ViT-B-32) and the shipped base, served by Ratchet, by Infinity and by mosec with ONNX
Runtime, from the same weights on the same cores, in turns; and, as the upper limit, Ratchet's engine in a loop with the
same decoding, and OpenVINO in the same precision where it is asked for (`--against openvino-raw`). No input is sent
twice, so no cache answers. Peers are installed at the first run, into ``HOME/cache/bench``, and servers stopped
(SIGSTOP) while they are not asked.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.bench_home import bench_home, cache_folder, clip_base, without_vlm
from benchmarks.command import bench_parser
from benchmarks.encode.figures import OURS, CellFigures, cell_figures, cpu_ms_per_request, ratios, show
from benchmarks.encode.grid import CONCURRENCIES, ITEMS, KINDS, Grid, cells
from benchmarks.encode.peers.servers import OPENVINO_RAW, PEERS, Peer, openai_template, openvino_raw
from benchmarks.encode.sides import HttpSide, RawSide, Side, Turn, check, cpu_seconds, ratchet_side
from benchmarks.line_worker import LineWorker
from benchmarks.machine import machine
from benchmarks.serving.session_processes import kill, session_pids
from benchmarks.stream.ratchet_process import RatchetProcess, write_settings
from core.addresses import free_port
from core.errors import BaseModelError, ConfigError
from core.progress import progress_log, step, track
from core.settings import Settings
from core.settings.section import MIB
from ratchet_client import Client
from serving.engines.clip_base import ClipBase

MODELS: Final = ("ViT-B-32", "shipped")
START_SECONDS: Final = 300.0
STOP_SECONDS: Final = 60.0
WARM_SECONDS: Final = 2.0
WARM_CONCURRENCY: Final = 8
ADMISSION: Final[dict[str, Any]] = {
    "queue": 4096, "deadline_seconds": 300.0, "caller_share": 1.0, "max_pixels": 500_000_000,
    "max_image_bytes": 32 * MIB,
}  # fmt: skip
"""Limits of admission, raised so that 128 clients of one address wait, as they do at peers, and are not refused."""


def run(
    settings: Settings, models: Sequence[str] = MODELS, peers: Sequence[str] = tuple(PEERS), grid: Grid | None = None
) -> dict[str, Any]:
    """Measure on new homes. Returns the figures; the ratios are those of the first model.

    Raises:
        ConfigError: there is no such model.
        RatchetError: a server does not start, or has other weights than the base.
    """
    grid = grid or Grid(cells(), rounds=3, seconds=5.0)
    began, rows, measured = time.time(), [], []
    for model in models:
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-", ignore_cleanup_errors=True) as folder:
            measured.append(_model(settings, clip_base(settings, model), peers, grid, Path(folder)))
            rows += measured[-1].cells
            progress_log.info(f"{model}: {json.dumps(ratios(measured[-1].cells))}")
    first = measured[0]
    return {
        "model": models[0], **ratios(first.cells), "cpu_ms_per_request": cpu_ms_per_request(first.cells),
        **first.about, "models": {each.cells[0].model: each.about for each in measured},
        "rounds": grid.rounds, "seconds_per_turn": grid.seconds, "seconds": round(time.time() - began, 1),
        "machine": machine(), "cells": [row.to_json() for row in rows],
    }  # fmt: skip


@dataclass
class ModelFigures:
    """All of one model. ``about``: engine, precision, cosines to the base's vectors, peers that cannot load it."""

    cells: list[CellFigures]
    about: dict[str, Any] = field(default_factory=dict)


def _model(settings: Settings, base: ClipBase, peers: Sequence[str], grid: Grid, folder: Path) -> ModelFigures:
    place: dict[str, Any] = {"port": free_port(), "host": "127.0.0.1", "operator_key": None}
    ours = bench_home(without_vlm(settings), folder / "home", base, **place, **ADMISSION)
    config = write_settings(ours, folder / "ratchet.json")
    with ExitStack() as stack:
        unable: dict[str, str] = {}
        cache, started = cache_folder(settings), list[Peer]()
        for name in (each for each in peers if each in PEERS):
            with _noting(unable, name):
                started.append(PEERS[name](base, cache, folder))
                stack.callback(started[-1].process.stop)
        with step(f"starting Ratchet and its peers with {base.name}"):
            _start_ratchet(ours, config, folder / "ratchet.log", stack)
            for peer in started:
                peer.wait()
                peer.process.pause()
        generator = stack.enter_context(LineWorker("benchmarks.encode.generator"))
        worker = stack.enter_context(LineWorker("benchmarks.encode.raw", str(config)))
        raws = [RawSide(worker, ours.serve.max_batch)]
        about = dict(raws[0].about)
        if OPENVINO_RAW in peers:
            with _noting(unable, OPENVINO_RAW), step("starting OpenVINO"):
                openvino = stack.enter_context(openvino_raw(base, about["precision"], cache, folder))
                raws.append(RawSide(openvino, ours.serve.max_batch, OPENVINO_RAW))
                about[OPENVINO_RAW] = raws[1].about
        server, others = ratchet_side(ours, generator), [_peer_side(peer, generator) for peer in started]
        with step("comparing vectors"):
            cosines = check(server, [*others, *raws[1:]], base, unable)
        for whose, reason in unable.items():
            progress_log.info(f"not measured: {whose}: {reason}")
        rows, idle = measure([server, *others, *raws], grid, base.name, lambda: session_pids(ours))
        about |= {"least_cosines": cosines, "unable": unable, "ratchet_idle_cores": idle}
        return ModelFigures(rows, about)


def measure(
    sides: Sequence[Side], grid: Grid, model: str, pids: Callable[[], list[int]]
) -> tuple[list[CellFigures], float]:
    """Ask all sides in turns, after a warm-up of each. ``pids``: Ratchet's processes, which keep running while others
    are asked.

    Returns:
        Figures of every cell, and the cores that Ratchet takes while others are asked.
    """
    by_name = {side.name: side for side in sides}
    for side in sides:
        for kind in {cell.kind for cell in grid.cells} & set(side.kinds):
            for cell in cells([kind], concurrencies=[WARM_CONCURRENCY]):
                side.measure(cell, min(WARM_SECONDS, grid.seconds))
    turns: dict[tuple[Any, str], list[Turn]] = {}
    idle, idle_seconds = 0.0, 0.0
    plan = [(cell, name) for cell, name in grid.turns(list(by_name)) if cell.kind in by_name[name].kinds]
    for cell, name in track(plan, f"asking {', '.join(by_name)} in turns"):
        before, began = cpu_seconds(pids()), time.monotonic()
        turns.setdefault((cell, name), []).append(by_name[name].measure(cell, grid.seconds))
        if name != OURS:
            idle += cpu_seconds(pids()) - before
            idle_seconds += time.monotonic() - began
    rows = [cell_figures(model, cell, {name: turns.get((cell, name), []) for name in by_name}) for cell in grid.cells]
    return rows, round(idle / idle_seconds, 3) if idle_seconds else 0.0


def _start_ratchet(settings: Settings, config: Path, log: Path, stack: ExitStack) -> None:
    settings.operator_key()
    part = RatchetProcess("serve", config, log)

    def stop() -> None:
        if not part.stop(STOP_SECONDS):
            kill(session_pids(settings))

    stack.callback(stop)
    part.start()
    with Client(settings.serve.url) as client:
        part.wait_for(client.is_ready, "Ratchet was ready", START_SECONDS)


@contextmanager
def _noting(unable: dict[str, str], name: str) -> Iterator[None]:
    """Note why a peer cannot load the base, and go on without it."""
    try:
        yield
    except BaseModelError as error:
        unable[name] = f"{error.message} {error.fix}"


def _peer_side(peer: Peer, generator: LineWorker) -> HttpSide:
    return HttpSide(
        peer.name, peer.url, openai_template, generator, peer.kinds(),
        pause=peer.process.pause, resume=peer.process.resume,
    )  # fmt: skip


def chosen_peers(text: str) -> list[str]:
    """Names with commas between them; ``none`` for no peer. Raises ConfigError."""
    names = [name.strip() for name in text.split(",") if name.strip() and name.strip() != "none"]
    known = (*PEERS, OPENVINO_RAW)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"--against: there is no peer {unknown[0]!r}.", f"There are: {', '.join(known)}, none.")
    return names


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("encode", __doc__)
    parser.add_argument(
        "--against", default=",".join(PEERS), help=f"with commas ({','.join(PEERS)}), {OPENVINO_RAW}; or none"
    )
    parser.add_argument(
        "--model", action="append",
        help=f"a registered base, or an architecture of open_clip with random weights; again for more ({MODELS})",
    )  # fmt: skip
    parser.add_argument("--kind", action="append", choices=KINDS, help="image, text (both)")
    parser.add_argument("--items", type=int, action="append", help=f"inputs of a request ({ITEMS})")
    parser.add_argument("--concurrency", type=int, action="append", help=f"requests at once ({CONCURRENCIES})")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side in each cell (3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a turn (5)")
    parser.add_argument("--quick", action="store_true", help="one round of 3 s at concurrency 1, 8 and 32, first model")
    options = parser.parse_args(arguments)
    levels = options.concurrency or ((1, 8, 32) if options.quick else CONCURRENCIES)
    grid = Grid(
        cells(options.kind or KINDS, options.items or ITEMS, levels),
        rounds=1 if options.quick else options.rounds, seconds=3.0 if options.quick else options.seconds,
    )  # fmt: skip
    if not grid.cells:
        raise ConfigError("no cell is left to measure.", "Fewer inputs in a request, or fewer requests at once.")
    models = options.model or (MODELS[:1] if options.quick else MODELS)
    show(run(settings, models, chosen_peers(options.against), grid))
