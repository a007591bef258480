"""``ratchet bench start``: seconds from the command ``ratchet serve`` until the first embedding, and where they go.

Each round has a new home: its first start chooses a precision by measuring, a second one knows the choice. Python may
write bytecode, and has from an earlier start of the same environment. Clock and processor seconds of each process are
those at the first answer; a process that has ended is not counted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from benchmarks.bench_home import bench_home, clip_base, without_vlm
from benchmarks.command import bench_parser, show_table
from benchmarks.machine import machine
from core.child_process import own_processor_seconds, ratchet_command, reaped, stop_reaped, tail
from core.errors import RatchetError
from core.progress import progress_log
from core.reaper import descendants
from core.settings import Settings
from ratchet_client import Client, ServerError
from serving.ray.ray_session import free_range

LIMIT_SECONDS: Final = 300.0
PAUSE: Final = 0.05
LOOK_SECONDS: Final = 0.5
"""Between looks at the processes, which cost milliseconds of the same cores."""
FEW: Final = 0.3
"""Processor seconds below which a process is counted with the others."""


def run(settings: Settings, base: str, rounds: int) -> dict[str, Any]:
    """Measure and return the figures. Raises RatchetError if a server does not start."""
    clip = clip_base(settings, base)
    starts: dict[str, list[dict[str, Any]]] = {"first": [], "warm": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
            home = without_vlm(bench_home(settings, Path(folder), clip))
            for kind, measured in starts.items():
                measured.append(start(home))
                progress_log.info(f"round {number + 1}, {kind} start: {measured[-1]['seconds']:.1f} s")
    figures: dict[str, Any] = {}
    for kind, measured in starts.items():
        seconds = sorted(each["seconds"] for each in measured)
        middle = min(measured, key=lambda each: abs(each["seconds"] - statistics.median(seconds)))
        figures |= {
            f"{kind}_seconds": round(statistics.median(seconds), 1), f"{kind}_range": [seconds[0], seconds[-1]],
            f"{kind}_begins": middle["steps"], f"{kind}_processor_seconds": middle["processors"],
        }  # fmt: skip
    return {**figures, "base": base, "rounds": rounds, "machine": machine()}


def start(settings: Settings) -> dict[str, Any]:
    """Start a server, embed a text, and end the server."""
    port = free_range(1)
    flags = [f"home={settings.home}", f"base.clip={settings.base.clip}", "base.vlm=", f"serve.port={port}"]
    log = settings.home / "start.log"
    began, steps, looked = time.monotonic(), dict[str, float](), -LOOK_SECONDS
    with log.open("wb") as file:
        command = reaped(ratchet_command("serve", flags=flags))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        with Client(f"http://127.0.0.1:{port}", retries=0) as client:
            while True:
                now = round(time.monotonic() - began, 1)
                if now - looked >= LOOK_SECONDS:
                    looked = now
                    for title in {*map(title_of, descendants(server.pid))}:
                        steps.setdefault(title, now)
                with suppress(ServerError):
                    client.embed(["a red bus"])
                    break
                if server.poll() is not None or now > LIMIT_SECONDS:
                    raise RatchetError("the server does not start.", tail(log))
                time.sleep(PAUSE)
        seconds = round(time.monotonic() - began, 1)
        return {"seconds": seconds, "steps": steps, "processors": processors(server.pid)}
    finally:
        stop_reaped(server)


def processors(root: int) -> dict[str, float]:
    """Processor seconds by title of process, most first; their sum, too."""
    sums: defaultdict[str, float] = defaultdict(float)
    for pid in descendants(root):
        sums[title_of(pid)] += own_processor_seconds(pid)
    seconds = {name: round(sums[name], 1) for name in sorted(sums, key=sums.__getitem__, reverse=True)}
    shown = {name: each for name, each in seconds.items() if each >= FEW}
    rest = sum(seconds.values()) - sum(shown.values())
    return {**shown, "others": round(rest, 1), "sum": round(sum(seconds.values()), 1)}


def title_of(pid: int) -> str:
    """A short name of a process: an actor's class, a script, or a program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    first = words[0]
    if first.startswith("ray::"):
        return first.removeprefix("ray::")[:40].strip()
    scripts = [word for word in words[1:] if word.endswith(".py")]
    if "-m" in words:
        return "ratchet serve"
    return Path(scripts[0]).name if scripts and first.rpartition("/")[2].startswith("python") else Path(first).name


def show(figures: Mapping[str, Any]) -> None:
    title = (
        f"{figures['base']}: the first embedding after {figures['first_seconds']} s, warm {figures['warm_seconds']} s"
    )
    table = Table(
        "process", "begins, first (s)", "processor, first (s)", "begins, warm (s)", "processor, warm (s)", title=title
    )
    names = dict.fromkeys([*figures["first_processor_seconds"], *figures["warm_processor_seconds"]])
    for name in names:
        keys = [f"{kind}_{what}" for kind in ("first", "warm") for what in ("begins", "processor_seconds")]
        table.add_row(name, *(str(figures[key].get(name, "")) for key in keys))
    show_table(table, figures, str(figures["machine"]))


def main(settings: Settings, arguments: Sequence[str]) -> None:
    parser = bench_parser("start", __doc__)
    parser.add_argument("--base", default="ViT-B-32", help="a registered CLIP, or an architecture with random weights")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if sys.platform != "linux":
        parser.error("processes are read from /proc, which this system does not have")
    show(run(settings, options.base, options.rounds))
