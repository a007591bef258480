"""A container: a process with the image as its root, the pod's volumes, and no privileges."""

from __future__ import annotations

import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from benchmarks.cluster.image import USER, Image
from core.errors import RatchetError
from core.waiting import wait_until

WORK_FOLDER: Final = "/var/lib/ratchet"
RIGHTS: Final = (
    "setpriv", f"--reuid={USER}", f"--regid={USER}", f"--groups={USER}", "--no-new-privs", "--bounding-set=-all",
    "--inh-caps=-all",
)  # fmt: skip
"""Those of the chart's securityContext, which the caller has compared."""


@dataclass(frozen=True)
class Mount:
    source: Path
    path: str
    read_only: bool


class Container:
    """A running container.

    Args:
        sandbox: process ID of the pod's first process, whose namespaces it joins.
        shares_processes: whether it sees those of the pod's other containers.
        log: file for its output.
    """

    def __init__(
        self, image: Image, sandbox: int, mounts: Sequence[Mount], *, command: Sequence[str],
        environment: Mapping[str, str], shares_processes: bool, root: Path, log: Path,
    ) -> None:  # fmt: skip
        self.environment = {**image.environment, **environment}
        self._depth = 1 if shares_processes else 2
        root.mkdir(parents=True, exist_ok=True)
        script = _script(image, mounts, root, command)
        processes = [] if shares_processes else ["--pid", "--fork", "--kill-child"]
        words = ["nsenter", f"--target={sandbox}", "--net", "--ipc", "--uts", "--pid"]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [*words, "unshare", "--mount", *processes, "bash", "-c", script], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def main(self) -> psutil.Process | None:
        """Its first process; None when it has ended."""
        try:
            process = psutil.Process(self.process.pid)
            for _ in range(self._depth):
                process = process.children()[0]
        except (psutil.NoSuchProcess, IndexError):
            return None
        return process

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    def terminate(self) -> None:
        if (main := self.main) is not None:
            main.send_signal(signal.SIGTERM)

    def run(self, command: Sequence[str], seconds: float = 120.0, **environment: str) -> str:
        """Run another command in it, as ``kubectl exec`` does, and return its output. Raises RatchetError when it
        fails.
        """
        main = self.main
        if main is None:
            raise RatchetError("the container has ended.", "Look at its log.")
        words = ["nsenter", f"--target={main.pid}", "--mount", "--net", "--ipc", "--uts", "--pid", "--root", "--wd"]
        done = subprocess.run(
            [*words, *RIGHTS, *command], env={**self.environment, **environment}, capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RatchetError(f"{shlex.join(command)} ends with {done.returncode}: {done.stderr[-2000:]}", "")
        return done.stdout


def start_sandbox(name: str, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process that holds a pod's namespaces and reaps orphans. Returns it and the process ID to join
    them by.
    """
    script = f"hostname {shlex.quote(name)}; while :; do sleep 3600 & wait; done"
    words = ["unshare", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", script]
    with log.open("ab") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    children = psutil.Process(process.pid).children
    if not wait_until(children, 10.0, pause=0.01, alive=lambda: process.poll() is None):
        raise RatchetError(f"no namespaces for {name}.", f"Only root may make them; see {log}.")
    return process, children()[0].pid


def _script(image: Image, mounts: Sequence[Mount], root: Path, command: Sequence[str]) -> str:
    inside = [Mount(source, path, True) for source, path in image.mounts] + list(mounts)
    lines = [
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={image.layer}:/", str(root)],
        ["mount", "--rbind", "/dev", f"{root}/dev"],
        ["mount", "--rbind", "/sys", f"{root}/sys"],
        ["mount", "-t", "proc", "proc", f"{root}/proc"],
    ]
    for mount in sorted(inside, key=lambda each: each.path):
        lines.append(["mount", "--bind", str(mount.source), f"{root}{mount.path}"])
        if mount.read_only:
            lines.append(["mount", "-o", "remount,bind,ro", f"{root}{mount.path}"])
    lines.append(["exec", "chroot", str(root), *RIGHTS, "env", f"--chdir={WORK_FOLDER}", *command])
    return "set -e\n" + "\n".join(map(shlex.join, lines))
