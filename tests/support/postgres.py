"""A real PostgreSQL in a temporary folder, for the tests that need one."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def free_port() -> int:
    """A TCP port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class PostgresServer:
    """A server with its own data folder. It refuses to run as root, so root runs it as another user."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ratchet-postgres-"))
        self.port = free_port()
        self.url = f"postgresql://ratchet@127.0.0.1:{self.port}/postgres"
        self._become = _other_user(self.root)
        self._data = self.root / "data"
        self._run("initdb", "-D", str(self._data), "-U", "ratchet", "-A", "trust", "-N")

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.root} -c fsync=off"
        self._control("-o", options, "start")

    def restart(self) -> None:
        """End it as a crash does, and start it again."""
        self._control("-m", "immediate", "stop")
        self.start()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """SIGSTOP for all its processes: connections stay open, and nobody answers."""
        leader = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        processes = [leader, *leader.children(recursive=True)]
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def remove(self) -> None:
        """End it and delete its files."""
        self._control("-m", "immediate", "stop")
        shutil.rmtree(self.root, ignore_errors=True)

    def _control(self, *words: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self.root / "log"), "-w", *words)

    def _run(self, name: str, *words: str) -> None:
        subprocess.run([*self._become, _binary(name), *words], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Start a server that may be stopped, suspended and restarted."""
    server = PostgresServer()
    server.start()
    try:
        yield server
    finally:
        server.remove()


@contextmanager
def postgres() -> Iterator[str]:
    """Start PostgreSQL and yield its SQLAlchemy URL."""
    with postgres_server() as server:
        yield server.url


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:  # a worker of the server that has ended
            continue


def _other_user(root: Path) -> list[str]:
    if os.getuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    entry = pwd.getpwnam(user)
    os.chown(root, entry.pw_uid, entry.pw_gid)
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]


def _binary(name: str) -> str:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(installed[-1]) if installed else (shutil.which(name) or name)
