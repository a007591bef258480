"""The states of a chaos run: how each is entered, used and left."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.serving.chaos_audit import Process, StateReport
from benchmarks.serving.chaos_installation import ChaosInstallation
from benchmarks.serving.chaos_plan import Phase, State
from benchmarks.serving.operator import Operator
from benchmarks.serving.whole_server import WholeServer
from benchmarks.stream.small_disk import SmallDisk
from core.errors import RatchetError
from core.progress import progress_log
from demo.load.traffic import Traffic
from tests.support.commit_relay import Loss

STEPS: Final = ("pending", "preparing", "committed", "announced")
"""Steps of a release between which processes are killed: proposed, being prepared, committed, reported to the
operator."""
LOSSES: Final[tuple[Loss, ...]] = ("answer", "request", "connection")
SETTLE_SECONDS: Final = 120.0
RELEASES_BEFORE: Final = 3
"""With a VLM the third one is of the VLM."""
REQUESTS_BEFORE: Final = 10
REFUSAL_PAUSE_SECONDS: Final = 10.0
PAUSE_SECONDS: Final = 1.0
DELAY_SECONDS: Final = 0.5
CLOCK_SECONDS: Final = 60
FAKETIME_LIBRARIES: Final = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
)


class Skipped(Exception):
    """A state that cannot be entered here; the message says why."""


class Chaos:
    """The running servers, and the current state."""

    def __init__(
        self, installation: ChaosInstallation, server: WholeServer, operator: Operator, load: Traffic, seed: int
    ) -> None:
        self.installation = installation
        self.server = server
        self.operator = operator
        self.load = load
        self.random = np.random.default_rng([seed, 2])
        self._pool = ThreadPoolExecutor(4)

    def prepare(self) -> None:
        """Release adapters, so that a rollback has a target, and wait until requests are answered."""
        report = StateReport("before")
        for _ in range(RELEASES_BEFORE):
            self.operator.release(self.server, report)
        self.load.wait_for(REQUESTS_BEFORE, SETTLE_SECONDS)

    def enter(self, phase: Phase) -> StateReport:
        report = StateReport(phase.state, began=time.time())
        progress_log.warning(f"{phase.state} for {phase.seconds:.0f} s")
        try:
            _ACTIONS[phase.state](self, phase.seconds, report)
        except Skipped as reason:
            report.skipped = str(reason)
        except (RatchetError, OSError) as error:
            report.problems.append(f"{type(error).__name__}: {error}"[:500])
        self._settle(report)
        report.ended = time.time()
        for problem in report.problems:
            progress_log.error(f"{report.state}: {problem}")
        return report

    def release(self, report: StateReport, clip: str | None = None) -> Future[bool]:
        return self._pool.submit(self.operator.release, self.server, report, clip)

    def rollback(self, report: StateReport, available: Callable[[], float] = lambda: 0.0) -> None:
        self.operator.rollback(self.server, report, available)

    def wait_for_step(self, step: str, before: int, release: Future[bool]) -> str:
        """Wait until the proposal after number ``before`` has reached a step, or the release has ended. Returns its
        state.
        """
        reached = STEPS[STEPS.index(step) :]
        while not release.done():
            newest = self.installation.ledger.proposals(1)[0]
            if step != "announced" and newest.id > before and newest.state in (*reached, "failed"):
                return newest.state
            time.sleep(0.002)
        return "announced"

    def _settle(self, report: StateReport) -> None:
        end = time.monotonic() + SETTLE_SECONDS
        try:
            self.server.wait_until_whole(SETTLE_SECONDS)
        except RatchetError as error:
            report.problems.append(str(error))
        while not self.operator.release(self.server, report):
            if time.monotonic() > end:
                report.problems.append(f"no release succeeded within {SETTLE_SECONDS:.0f} s after the state was left")
                return
            time.sleep(PAUSE_SECONDS)


def _until(seconds: float) -> Iterator[int]:
    """Rounds until the time is over; at least one."""
    end = time.monotonic() + seconds
    for number in itertools.count():
        yield number
        if time.monotonic() >= end:
            return


def _ledger_stopped(run: Chaos, seconds: float, report: StateReport) -> None:
    end = time.monotonic() + seconds
    with run.installation.postgres.suspended():
        for _ in _until(seconds):
            run.operator.refused(run.server, report)
            time.sleep(max(0.0, min(REFUSAL_PAUSE_SECONDS, end - time.monotonic())))
    back = run.installation.wait_for_ledger()
    run.rollback(report, lambda: back)


def _ledger_killed(run: Chaos, seconds: float, report: StateReport) -> None:
    for _ in _until(seconds):
        release = run.release(report)
        run.installation.postgres.kill()
        run.operator.refused(run.server, report)
        time.sleep(float(run.random.uniform(0.5, 5.0)))
        run.installation.postgres.start()
        back = run.installation.wait_for_ledger()
        run.rollback(report, lambda back=back: back)  # type: ignore[misc]
        release.result()


def _commit_lost(run: Chaos, seconds: float, report: StateReport) -> None:
    relay, back = run.installation.commits, 0.0
    before_all = relay.lost

    def restart() -> None:
        nonlocal back
        run.installation.postgres.restart()
        back = run.installation.wait_for_ledger()

    for number in _until(seconds):
        loss = LOSSES[number % len(LOSSES)]
        before = run.installation.ledger.proposals(1)[0].id
        release = run.release(report)
        run.wait_for_step("preparing", before, release)
        lost = relay.lost
        relay.lose(loss, restart)
        release.result()
        run.rollback(report, lambda: back)
        if relay.lost == lost:  # nothing was committed after the relay was told to: the next release's will be lost
            run.release(report).result()
    report.commits_lost = relay.lost - before_all


def _objects_away(run: Chaos, seconds: float, report: StateReport) -> None:
    for away in (run.installation.objects.suspended(), run.installation.objects.cut_off()):
        with away:
            _while_preparing(run, seconds / 2, report)


def _objects_slow(run: Chaos, seconds: float, report: StateReport) -> None:
    with run.installation.objects.slow(DELAY_SECONDS):
        _while_preparing(run, seconds, report)


def _while_preparing(run: Chaos, seconds: float, report: StateReport) -> None:
    end = time.monotonic() + seconds
    release = run.release(report, run.installation.new_adapter())
    time.sleep(PAUSE_SECONDS)
    run.rollback(report)
    time.sleep(max(0.0, end - time.monotonic()))
    run.rollback(report)
    release.result()


def _disk_full(run: Chaos, seconds: float, report: StateReport, disk: SmallDisk) -> None:
    if not disk.mounted:
        raise Skipped("no small disk can be mounted here; that takes root")
    try:
        for _ in _until(seconds):
            disk.fill()
            run.operator.release(run.server, report)
            run.rollback(report)
            time.sleep(PAUSE_SECONDS)
    finally:
        disk.free()


def _metrics_full(run: Chaos, seconds: float, report: StateReport) -> None:
    _disk_full(run, seconds, report, run.server.metrics_disk)


def _home_full(run: Chaos, seconds: float, report: StateReport) -> None:
    _disk_full(run, seconds, report, run.installation.home_disk)


def _killed(process: Process) -> Callable[[Chaos, float, StateReport], None]:
    def act(run: Chaos, seconds: float, report: StateReport) -> None:
        if process == "vlm" and not run.server.settings.base.vlm:
            raise Skipped("no VLM is served")
        first = int(run.random.integers(len(STEPS)))
        for number in _until(seconds):
            before = run.installation.ledger.proposals(1)[0].id
            release = run.release(report)
            state = run.wait_for_step(STEPS[(first + number) % len(STEPS)], before, release)
            time.sleep(float(run.random.uniform(0.0, 0.05)))
            report.kills.append(run.server.kill(process, state))
            run.rollback(report)
            release.result()
            run.server.wait_until_whole(SETTLE_SECONDS)

    return act


@contextmanager
def _beside(run: Chaos, environment: dict[str, str]) -> Iterator[WholeServer]:
    second = run.installation.server(environment)
    second.start()
    run.load.send_to(run.server.url, second.url)
    yield second


def _rollbacks_through_both(run: Chaos, second: WholeServer, seconds: float, report: StateReport) -> None:
    for number in _until(seconds):
        there, back = (run.server, second) if number % 2 else (second, run.server)
        run.operator.release(there, report)
        run.operator.rollback(back, report)
        time.sleep(PAUSE_SECONDS)


def _second_server(run: Chaos, seconds: float, report: StateReport) -> None:
    with _beside(run, {}) as second:
        _rollbacks_through_both(run, second, seconds, report)
        first, run.server = run.server, second
        run.load.send_to(second.url)
        time.sleep(PAUSE_SECONDS)  # until the generator has read it
        ending = run._pool.submit(first.stop)
        run.rollback(report)
        if not ending.result():
            report.problems.append("the first server did not end by itself after SIGTERM")
        run.operator.release(run.server, report)
        run.rollback(report)


def _clock_ahead(run: Chaos, seconds: float, report: StateReport) -> None:
    library = faketime_library()
    if library is None:
        raise Skipped("libfaketime is not installed (`pip install libfaketime`, or Debian's package of that name)")
    clock = {"LD_PRELOAD": str(library), "FAKETIME": f"+{CLOCK_SECONDS}s", "DONT_FAKE_MONOTONIC": "1"}
    with _beside(run, clock) as second:
        _rollbacks_through_both(run, second, seconds, report)
        run.load.send_to(run.server.url)
        time.sleep(PAUSE_SECONDS)
        if not second.stop():
            report.problems.append("the second server did not end by itself after SIGTERM")
        run.rollback(report)


def faketime_library() -> Path | None:
    package = importlib.util.find_spec("libfaketime")
    bundled = Path(package.origin).parent if package is not None and package.origin is not None else Path()
    libraries = [bundled / "vendor" / "libfaketime" / "src" / "libfaketime.so.1", *map(Path, FAKETIME_LIBRARIES)]
    return next((library for library in libraries if library.is_file()), None)


_ACTIONS: Final[dict[State, Callable[[Chaos, float, StateReport], None]]] = {
    "ledger-stopped": _ledger_stopped,
    "ledger-killed": _ledger_killed,
    "commit-lost": _commit_lost,
    "objects-away": _objects_away,
    "objects-slow": _objects_slow,
    "metrics-full": _metrics_full,
    "home-full": _home_full,
    "encoder-killed": _killed("encoder"),
    "vlm-killed": _killed("vlm"),
    "catalog-killed": _killed("catalog"),
    "ingress-killed": _killed("ingress"),
    "controller-killed": _killed("controller"),
    "second-server": _second_server,
    "clock-ahead": _clock_ahead,
}
