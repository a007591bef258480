"""Runs the tests that need external services and reports the versions that they ran against.

``python -m tests.outside [--write-table] [words for pytest]``; ``--write-table`` puts the table into docs/support.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.outside.kubernetes import cluster
from tests.support import apache_kafka, keycloak, minio, nginx
from tests.support.downloads import installed
from tests.support.postgres import binary

PAGE: Final = Path(__file__).parents[2] / "docs" / "support.md"
HEADING: Final = "## What ran against what"


class Peer(NamedTuple):
    """An external service or program."""

    name: str
    version: Callable[[], str]
    tests: tuple[str, ...]
    """Folders and modules whose tests all need it."""


def _says(program: str | None, *words: str) -> str:
    if program is None:
        return "-"
    done = subprocess.run([program, *words], capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return found[0] if found else "-"


PEERS: Final = (
    Peer("Apache Kafka", lambda: f"{apache_kafka.VERSION}, one KRaft node",
         ("tests/outside/kafka", "tests/integration/streams")),
    Peer("MinIO", lambda: minio.RELEASE, ("tests/outside/s3", "tests/integration/test_s3.py",
         "tests/integration/test_held_deletions.py")),
    Peer("Kubernetes", lambda: cluster.VERSIONS, ("tests/outside/kubernetes",)),
    Peer("Docker", lambda: _says(installed("dockerd"), "--version"), ("tests/outside/images",)),
    Peer("Keycloak", lambda: f"{keycloak.VERSION}, nginx {_says(nginx.BINARY, '-v')}", ("tests/outside/oidc",)),
    Peer("nginx", lambda: _says(nginx.BINARY, "-v"), ("tests/integration/test_nginx.py",)),
    Peer("PgBouncer", lambda: f"{_says(installed('pgbouncer'), '--version')}, by transaction, PostgreSQL "
         f"{_says(binary('postgres'), '--version')}",
         ("tests/integration/ledger/test_pgbouncer.py",)),
    Peer("PostgreSQL", lambda: _says(binary("postgres"), "--version"),
         ("tests/integration/ledger",)),
)  # fmt: skip


class Ran(NamedTuple):
    """Results of the tests of a peer."""

    outcomes: Mapping[str, int]
    seconds: float

    def line(self, peer: Peer) -> str:
        told = ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items(), reverse=True))
        return f"| {peer.name} | {peer.version()} | {told} | {self.seconds:,.0f} s | {time.strftime('%Y-%m-%d')} |"


def peer_of(test: str) -> Peer | None:
    of = [(len(path), peer) for peer in PEERS for path in peer.tests if test.startswith(path)]
    return max(of, key=lambda each: each[0])[1] if of else None


class Report:
    """Counts while tests run."""

    def __init__(self) -> None:
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self._seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        peer = peer_of(report.nodeid)
        if peer is None:
            return
        self._seconds[peer.name] += report.duration  # type: ignore[assignment]
        if report.when == "call" or report.outcome != "passed":
            name = "left out" if report.skipped else report.outcome
            self._outcomes[peer.name][name] += 1

    def ran(self) -> dict[str, Ran]:
        return {name: Ran(outcomes, self._seconds[name]) for name, outcomes in self._outcomes.items()}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("what ran against what")
        ran = self.ran()
        for peer in PEERS:
            if peer.name in ran:
                terminalreporter.line(ran[peer.name].line(peer))


def written(page: str, ran: Mapping[str, Ran]) -> str:
    before, heading, table = page.partition(HEADING)
    for peer in PEERS:
        if peer.name in ran and set(ran[peer.name].outcomes) != {"left out"}:
            table, rows = re.subn(rf"^\| {peer.name} \| .*\|$", ran[peer.name].line(peer), table, count=1, flags=re.M)
            assert rows == 1, f"{PAGE} has no row for {peer.name}"
    return before + heading + table


def main(words: list[str]) -> int:
    """Return the exit status of pytest. ``words``: its arguments; without a path all tests of all peers run."""
    write, words = "--write-table" in words, [each for each in words if each != "--write-table"]
    os.environ |= {"RATCHET_TEST_KAFKA": "apache", "RATCHET_TEST_S3": "minio"}
    paths = [] if any(each.startswith("tests/") for each in words) else [path for peer in PEERS for path in peer.tests]
    report = Report()
    status = pytest.main([*paths, *words], plugins=[report])
    if write:
        PAGE.write_text(written(PAGE.read_text(), report.ran()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
