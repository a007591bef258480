"""``python -m benchmarks.continual.worker HOME BASE RESULTS METHOD ORDER SEED UPDATES TRIAL``: one unit, in a process.

Ends with 0 when it is done or was stopped, and with 1 and the reason in ``failed.json`` when it cannot be done.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from benchmarks.continual.chain import Chain, Unit
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.stream import load_stream
from ops.errors import RatchetError
from serving.engines.clip_base import load_base
from updater.loop.process import StopSignal
from updater.training.checkpoint import write_json
from updater.training.workers import Stopped

FAILED = "failed.json"


def work(home: Path, base: str, results: Path, unit: Unit, updates: int, protocol: Protocol, stop: StopSignal) -> int:
    """Run the unit; returns the exit status. A trial is scored on the tuning suites."""
    failed = unit.folder(results) / FAILED
    failed.unlink(missing_ok=True)
    try:
        stream = load_stream(home, protocol)
        if unit.trial is not None:
            stream = replace(stream, suites=stream.tuning)
        chain = Chain(load_base(home, base), stream, protocol, unit.recipe, unit, results)
        with stop.training():
            chain.run(updates, stop)
    except Stopped:
        return 0
    except Exception as error:
        reason = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"
        write_json(failed, {"reason": reason, "trace": traceback.format_exc()})
        return 1
    return 0


def main(arguments: list[str]) -> int:
    """The process."""
    import torch

    torch.set_num_threads(1)
    home, base, results, method, order, seed, updates, trial, protocol = arguments
    stop = StopSignal()
    stop.install()
    unit = Unit(method, int(order), int(seed), int(trial) if trial else None)
    return work(Path(home), base, Path(results), unit, int(updates), Protocol(**json.loads(protocol)), stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
