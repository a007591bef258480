"""MinIO on this machine, from Go's module proxy: built once (252 MB to download), with its data in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import boto3
from s3fs import S3FileSystem

from core.addresses import free_port, listens
from core.child_process import reaped, stop_reaped
from tests.support.downloads import from_go, launched
from tests.support.environment import of_s3, variables

RELEASE: Final = "v0.0.0-20260212201848-7aac2a2c5b7c"
"""The last commit that MinIO has published; its releases are not versions of the module."""
MAIN: Final = """package main

import (
	"os"

	minio "github.com/minio/minio/cmd"
)

func main() { minio.Main(os.Args) }
"""
START_SECONDS: Final = 60.0
KEY: Final = "minio"
SECRET: Final = "minio-secret"


class MinIO:
    """A server that may be killed, stopped and started again. A context manager.

    Inside, the environment of this process has its address and the keys of its root user. ``disk``: folder for its
    data; temporary by default. Raises NotHere on construction when Go is missing or cannot build it.
    """

    def __init__(self, disk: Path | None = None) -> None:
        self._program = from_go(f"minio-{RELEASE}", "github.com/minio/minio", RELEASE, MAIN)
        self._root = Path(tempfile.mkdtemp(prefix="ratchet-minio-"))
        self._disk = disk or self._root / "data"
        self._address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    def start(self) -> None:
        command = [str(self._program), "server", "--quiet", "--address", self._address, str(self._disk)]
        keys = {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET}
        environ = {**os.environ, **keys, "MINIO_BROWSER": "off", "MINIO_UPDATE": "off", "HOME": str(self._root)}
        self._process = launched(
            reaped(command), self._root / "server.log", lambda: listens(self._address), START_SECONDS, env=environ
        )

    def stop(self) -> None:
        """End it; acknowledged data stays on its disk."""
        process, self._process = self._process, None
        if process is not None:
            stop_reaped(process)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """SIGSTOP: connections stay open without answers."""
        pid = self._server()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self._server(), signal.SIGKILL)
        self.stop()

    @contextmanager
    def without(self, *actions: str) -> Iterator[None]:
        """Inside, this process's keys are those of a user with all rights but these S3 actions."""
        rules: list[dict[str, Any]] = [
            {"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]},
            {"Effect": "Deny", "Action": list(actions), "Resource": ["arn:aws:s3:::*"]},
        ]
        policy = json.dumps({"Version": "2012-10-17", "Statement": rules})
        role = {"RoleArn": "arn:x:ignored:by:minio", "RoleSessionName": "test"}
        keys = boto3.client("sts").assume_role(**role, Policy=policy)["Credentials"]
        names = {"AWS_ACCESS_KEY_ID": "AccessKeyId", "AWS_SECRET_ACCESS_KEY": "SecretAccessKey",
                 "AWS_SESSION_TOKEN": "SessionToken"}  # fmt: skip
        S3FileSystem.clear_instance_cache()
        with variables({name: keys[key] for name, key in names.items()}):
            yield
        S3FileSystem.clear_instance_cache()

    def __enter__(self) -> MinIO:
        self._stack.enter_context(variables(of_s3(f"http://{self._address}", KEY, SECRET)))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._stack.close()
        shutil.rmtree(self._root)

    def _server(self) -> int:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0]) if children else self._process.pid
