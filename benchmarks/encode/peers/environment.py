"""Python environments, made once and kept, for servers whose dependencies conflict with Ratchet's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from core.digests import digest_json
from core.errors import RatchetError
from core.progress import step

INSTALL_SECONDS: Final = 3600.0
DONE: Final = "installed"


@dataclass(frozen=True)
class Environment:
    """Requirements of an environment. The folder's name has a digest of them, so that other requirements get another
    one.
    """

    name: str
    requirements: tuple[str, ...]

    def folder(self, cache: Path) -> Path:
        digest = digest_json([*self.requirements, sys.version_info[:2]])[:8]
        return cache / "environments" / f"{self.name}-{digest}"

    def ensure(self, cache: Path) -> Path:
        """Return its Python, after making it with pip, as this machine configures pip, if it is missing. Raises
        RatchetError if pip fails; the end of its output is in the message.
        """
        folder = self.folder(cache)
        python = folder / "bin" / "python"
        if (folder / DONE).exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)  # an installation that was interrupted
        folder.parent.mkdir(parents=True, exist_ok=True)
        with step(f"installing {self.name} into {folder} (once, some minutes)"):
            log = folder.with_suffix(".log")
            with log.open("wb") as out:
                for command in (
                    [sys.executable, "-m", "venv", str(folder)],
                    [str(python), "-m", "pip", "install", "--disable-pip-version-check", *self.requirements],
                ):
                    done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=INSTALL_SECONDS)
                    if done.returncode:
                        tail = log.read_text(errors="replace")[-1500:]
                        raise RatchetError(
                            f"{self.name} could not be installed: {tail}",
                            f"See {log}; leave it out with --against, or try again with a network.",
                        )
            (folder / DONE).touch()
        return python


def same_torch() -> tuple[str, ...]:
    """Requirements for the torch that Ratchet has, so that peers compute with the same kernels."""
    return tuple(f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision"))
