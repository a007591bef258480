"""A real PostgreSQL in a temporary folder, for the tests that need one."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A TCP port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres() -> Iterator[str]:
    """Start PostgreSQL and yield its SQLAlchemy URL. It refuses to run as root, so root runs it as another user."""
    root = Path(tempfile.mkdtemp(prefix="ratchet-postgres-"))
    data, port = root / "data", free_port()
    become = _other_user(root)
    subprocess.run(
        [*become, _binary("initdb"), "-D", data, "-U", "ratchet", "-A", "trust", "-N"], check=True, stdout=-3
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root} -c fsync=off"
    control = [*become, _binary("pg_ctl"), "-D", str(data), "-l", str(root / "log"), "-w"]
    subprocess.run([*control, "-o", options, "start"], check=True, stdout=-3)
    try:
        yield f"postgresql://ratchet@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=-3)
        shutil.rmtree(root, ignore_errors=True)


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
