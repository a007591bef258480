"""A Docker engine with the Dockerfile's base image: the engine that answers, or one started here.

What is missing comes from package registries: the command line's plugins are built by Go, and without a registry of
images the base is made of Debian's packages and this machine's Python. All of it is kept in
``~/.cache/ratchet-tests/docker`` (15 GB).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from core.child_process import reaped
from core.progress import progress_log
from tests.support.downloads import CACHE, SYSTEM_PATH, NotHere, from_go, running

PLUGINS: Final = {
    "buildx": ("github.com/docker/buildx", "v0.29.1", "cmd/buildx"),
    "compose": ("github.com/docker/compose/v2", "v2.40.3", "cmd"),
}
"""Module, version and package of plugins of ``docker``."""
FOLDER: Final = CACHE / "docker"
START_SECONDS: Final = 60.0
BUILD_SECONDS: Final = 3600.0
CERTIFICATES: Final = "/etc/ssl/certs/ca-certificates.crt"
METADATA: Final = ("ENV ", "EXPOSE ", "CMD ", "ENTRYPOINT ", "USER ", "HEALTHCHECK ", "LABEL ")
"""Instructions of a Dockerfile that make no layer."""


class Layer(NamedTuple):
    """A layer of an image. ``size``: bytes, unpacked."""

    digest: str
    size: int
    instruction: str


class Engine:
    """Commands for an engine. They fail the test if they fail."""

    def __call__(self, *words: str, seconds: float = 300, **environment: str) -> str:
        """Run a ``docker`` command; returns its output."""
        done = subprocess.run(
            ["docker", *words], capture_output=True, text=True, timeout=seconds, env=os.environ | environment
        )
        if done.returncode:
            pytest.fail(f"docker {' '.join(words)}: {done.stdout[-4000:]}{done.stderr[-4000:]}")
        return done.stdout

    def build(self, context: Path, target: str) -> list[Layer]:
        """Build the image ``ratchet:<target>``; returns its layers, the base's first."""
        progress_log.info(f"docker: building {target}")
        options = ("--network", "host", "--target", target, "--tag", f"ratchet:{target}")
        self("buildx", "build", "--progress", "plain", *options, str(context), seconds=BUILD_SECONDS)
        return self.layers(f"ratchet:{target}")

    def layers(self, image: str) -> list[Layer]:
        (inspected,) = self.inspect(image)
        lines = self("history", "--no-trunc", "--human=false", "--format", "{{json .}}", image).splitlines()
        steps = [step for step in map(json.loads, reversed(lines)) if not step["CreatedBy"].startswith(METADATA)]
        digests = inspected["RootFS"]["Layers"]
        return [
            Layer(digest, int(step["Size"]), step["CreatedBy"] or "base")
            for digest, step in zip(digests, steps, strict=True)
        ]

    def inspect(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self("inspect", name))
        return found


@contextmanager
def engine(base: str) -> Iterator[Engine]:
    """An engine that has the image ``base``, during the block. Raises NotHere if this machine cannot run one."""
    if shutil.which("docker") is None:
        raise NotHere("no docker (apt-get install docker.io)")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if _docker("info").returncode:
            stack.enter_context(_started())
        _add_plugins(stack.enter_context(pytest.MonkeyPatch.context()))
        if _docker("image", "inspect", base).returncode and _docker("pull", base).returncode:
            _import(_debian(), base)
        yield Engine()


def _docker(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=600)


@contextmanager
def _started() -> Iterator[None]:
    path = f"{SYSTEM_PATH}:{os.environ['PATH']}"
    missing = [program for program in ("dockerd", "iptables") if shutil.which(program, path=path) is None]
    if os.geteuid() or missing:
        raise NotHere(f"no engine answers, and to start one takes root and {' and '.join(missing) or 'dockerd'}")
    run = FOLDER / "run"
    command = ["dockerd", "--data-root", str(FOLDER / "data"), "--exec-root", str(run), "--pidfile", f"{run}.pid",
               "--host", f"unix://{run}.sock"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.setenv("DOCKER_HOST", f"unix://{run}.sock")
        ready = lambda: _docker("info").returncode == 0  # noqa: E731
        with running(reaped(command), FOLDER / "dockerd.log", ready, START_SECONDS):
            yield


def _add_plugins(patch: pytest.MonkeyPatch) -> None:
    missing = [name for name in PLUGINS if _docker(name, "version").returncode]
    if missing:
        folder = FOLDER / "config" / "cli-plugins"
        folder.mkdir(parents=True, exist_ok=True)
        patch.setenv("DOCKER_CONFIG", str(folder.parent))
    for name in missing:
        module, version, package = PLUGINS[name]
        built = from_go(f"docker-{name}-{version}", module, version, package=f"{module}/{package}")
        link = folder / f"docker-{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(built)


def _debian() -> Path:
    """A root folder with this machine's release of Debian and its Python, laid out as in Docker's image of Python."""
    root = FOLDER / "base"
    if (root / "usr" / "local" / "bin" / "pip").exists():
        return root
    if shutil.which("debootstrap", path=os.environ["PATH"]) is None or os.geteuid():
        raise NotHere("no registry answers, and to make a base image takes root and debootstrap")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = Path(sys.base_prefix)
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    progress_log.info(f"docker: making a base image of Debian {suite} and Python {version}")
    shutil.rmtree(root, ignore_errors=True)
    packages = ",".join(["ca-certificates", *_packages_of(home / "lib" / f"python{version}" / "lib-dynload")])
    _run("debootstrap", "--variant=minbase", f"--include={packages}", suite, str(root))
    _run("chroot", str(root), "apt-get", "clean")
    (root / "etc/apt/apt.conf.d/docker-clean").write_text('Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n')
    local = root / "usr" / "local"
    left_out = shutil.ignore_patterns("site-packages", "__pycache__", "test", "*.a", "*tkinter*")
    shutil.copytree(home / "lib", local / "lib", symlinks=True, dirs_exist_ok=True, ignore=left_out)
    shutil.copy2(home / "bin" / f"python{version}", local / "bin")
    shutil.copy2(os.environ.get("SSL_CERT_FILE", CERTIFICATES), f"{root}{CERTIFICATES}")
    inside = ["chroot", str(root)]
    _run(*inside, "ldconfig")
    _run(*inside, f"/usr/local/bin/python{version}", "-m", "ensurepip")
    for name, program in {"python": f"python{version}", "python3": f"python{version}", "pip": "pip3"}.items():
        (local / "bin" / name).symlink_to(program)
    return root


def _packages_of(modules: Path) -> set[str]:
    """Debian's packages of the libraries that Python's own modules load."""
    files = [str(path) for path in modules.glob("*.so") if "tkinter" not in path.name]
    libraries = set(re.findall(r"=> \S+/(\S+) ", _run("ldd", *files)))
    found = subprocess.run(["dpkg", "-S", *(f"*/{name}" for name in libraries)], capture_output=True, text=True)
    return {line.partition(":")[0] for line in found.stdout.splitlines() if not line.startswith("diversion")}


def _import(root: Path, name: str) -> None:
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    options = ["--change", path, "--change", f"ENV PIP_CERT={CERTIFICATES}", "--change", 'CMD ["python3"]']
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as packed:
        subprocess.run(["docker", "import", *options, "-", name], stdin=packed.stdout, check=True, capture_output=True)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise NotHere(f"{words[0]} failed: {(done.stdout + done.stderr)[-500:]}")
    return done.stdout
