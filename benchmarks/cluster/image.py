"""The Dockerfile's image, emulated: this machine's root with the package's environment on top."""

from __future__ import annotations

import compileall
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
USER: Final = 10001
SOURCE: Final = "/opt/ratchet"
"""Path of the checkout in a container, wherever it is outside."""
ENVIRONMENT: Final = "/opt/venv"
"""Path of its Python environment in a container."""
PACKAGES: Final = ("client/src/ratchet_client", "core", "demo", "ops", "streams", "serving", "updater")
LOGIN_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COMPILERS: Final = ("cc", "gcc", "g++", "c++", "clang", "clang++")
"""Paths that this machine may have and the image lacks."""


class Image:
    """Read-only layers: a folder with the image's additions, over this machine's root."""

    def __init__(self, folder: Path) -> None:
        self.layer = folder / "layer"
        self.layer.mkdir(parents=True)
        # On a file system of its own: a layer may not lie inside another.
        subprocess.run(["mount", "-t", "tmpfs", "image", str(self.layer)], check=True)
        for name in ("root", "etc", "usr/bin", "usr/local/bin", "var/lib", "run", SOURCE[1:], ENVIRONMENT[1:]):
            (self.layer / name).mkdir(parents=True, exist_ok=True)
        for name in ("var/lib/ratchet", "run/ratchet", "home/ratchet"):
            (self.layer / name).mkdir(parents=True)
            os.chown(self.layer / name, USER, USER)
        (self.layer / "etc" / "resolv.conf").write_text("")  # no name server: other names are unknown
        self._add_user()
        self._add_commands()
        for name in COMPILERS:
            os.mknod(self.layer / "usr" / "bin" / name, 0o020000, 0)  # overlayfs's marker of a deleted file
        for package in PACKAGES:  # as pip does: a container could not keep what it compiles
            compileall.compile_dir(ROOT / package, quiet=1)
        # gRPC's own resolver asks a name server even for names in the file, and there is none.
        self.environment = {
            **image_environment(), "PATH": LOGIN_PATH, "PYTHONPATH": f"{SOURCE}:{SOURCE}/client/src",
            "GRPC_DNS_RESOLVER": "native",
        }  # fmt: skip
        python = Path(sys.base_prefix).resolve()
        self.mounts = [
            (Path(sys.prefix).resolve(), ENVIRONMENT),
            (ROOT, SOURCE),
            (python, str(python)),
        ]

    def make_mount_points(self, folders: Iterable[str], files: Iterable[str]) -> None:
        for path in folders:
            (self.layer / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for path in files:
            file = self.layer / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def _add_user(self) -> None:
        entry = f"ratchet:x:{USER}:"
        for name, line in {"passwd": f"{entry}{USER}::/home/ratchet:/usr/sbin/nologin", "group": entry}.items():
            (self.layer / "etc" / name).write_text(Path("/etc", name).read_text().rstrip("\n") + f"\n{line}\n")

    def _add_commands(self) -> None:
        python = f"{ENVIRONMENT}/bin/python"
        for file in Path(sys.prefix, "bin").iterdir():
            if file.name.startswith("python"):
                self._command(file.name, python)
            elif file.is_file() and file.read_bytes()[:2] == b"#!":
                self._command(file.name, f"{python} {ENVIRONMENT}/bin/{file.name}")

    def _command(self, name: str, words: str) -> None:
        file = self.layer / "usr" / "local" / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o755)


def _stage(name: str) -> str:
    return (ROOT / "Dockerfile").read_text().partition(f" AS {name}\n")[2].partition("\nFROM ")[0]


def image_environment() -> dict[str, str]:
    block = re.search(r"^ENV ((?:.*\\\n)*.*)$", _stage("run"), re.MULTILINE)
    return dict(word.split("=", 1) for word in block[1].replace("\\\n", " ").split()) if block else {}
