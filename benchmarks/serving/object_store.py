"""An S3 server (moto) behind a relay, which can be stopped, cut off and slowed down."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.stream.ratchet_process import wait_for
from core.addresses import free_port, listens
from tests.support.environment import of_s3, variables
from tests.support.tcp_relay import TcpRelay

BUCKET = "bench"
URL = f"s3://{BUCKET}/ratchet"


class ObjectStore:
    """moto keeps objects in memory, so it is suspended and not restarted: contents stay."""

    def __init__(self, log: Path, address: str = "127.0.0.1") -> None:
        """``log``: file for its output. ``address``: to listen on; the relay is on 127.0.0.1 in any case."""
        self.log = log
        self.address = address
        self.port = free_port()
        self.relay = TcpRelay(free_port(), f"{address}:{self.port}")
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    def environment(self, relayed: bool = True) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.relay.port}" if relayed else f"http://{self.address}:{self.port}"
        return of_s3(url, "key", "secret")

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """SIGSTOP: connections stay open without answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        self.relay.cut()
        try:
            yield
        finally:
            self.relay.open()

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        self.relay.delay_seconds = seconds
        try:
            yield
        finally:
            self.relay.delay_seconds = 0.0

    def __enter__(self) -> ObjectStore:
        import boto3

        command = [sys.executable, "-m", "moto.server", "-H", self.address, "-p", str(self.port)]
        with self.log.open("ab") as out:
            process = self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_for(
                self._listens, "the object store listened", 120, lambda: process.poll() is None, f"See {self.log}."
            )
        except BaseException:  # also on a signal: the block was not entered, so nothing else would end it
            process.kill()
            process.wait()
            raise
        # for this process, which observes
        self._stack.enter_context(variables(self.environment(relayed=False)))
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        self.relay.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.relay.cut()
        self._stack.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _listens(self) -> bool:
        return listens(f"{self.address}:{self.port}")
