"""A small disk that can be filled: a tmpfs, if this process may mount one."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

BALLAST = "ballast"


class SmallDisk:
    """A folder on a file system of ``size`` bytes; a plain folder if that is impossible (see :attr:`mounted`)."""

    def __init__(self, folder: Path, size: int = 256 << 20) -> None:
        self.folder = folder
        self.size = size
        self.mounted = False

    def fill(self) -> None:
        """Leave no byte free. Call it again to take what has been freed since."""
        with (self.folder / BALLAST).open("ab", buffering=0) as ballast:
            for block in (1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        ballast.write(bytes(block))  # less than a block, before it fails

    def free(self) -> None:
        (self.folder / BALLAST).unlink(missing_ok=True)

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.size},mode=0700", "ratchet-chaos", str(self.folder)]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            with suppress(OSError):
                self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)
