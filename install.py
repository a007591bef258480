"""Install Ratchet with extras where the Python that runs this lives: ``.venv/bin/python install.py local``.

The extras are those of pyproject.toml: ``local`` for `ratchet demo`, ``dev`` (the default) for the tests as well.

uv does it: pip resolves, downloads and unpacks one package after another, which takes minutes. uv reads no
configuration of pip: what pip has been told of indexes, folders of wheels, constraints, certificates and time-outs is
passed on in uv's variables, unless those are set already.

PyTorch's build decides how much there is to download. The smallest one that this machine can reach is taken:

1. the build for processors from a folder or an index of pip's configuration, where that has it;
2. else from PyTorch's own index, when it answers: for processors without an NVIDIA driver, else for that driver's CUDA;
3. else PyPI's, which brings CUDA's libraries along whether there is a GPU or not.
"""

from __future__ import annotations

import ast
import os
import shutil
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

UV = "uv>=0.13,<1"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu/torch/"
"""A page that is there when PyTorch's own index can be reached."""
ANSWERS_WITHIN_SECONDS = 4.0
UNPACKED = 2.2
"""Bytes on the disk for each byte of a wheel: 4.15 GB of the tests' wheels become 8.7 GB."""
GB = 1e9
RANK = {"global": 0, "install": 1, ":env:": 2}
"""Sections of pip's configuration; a later one wins."""
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
}
"""pip's option: uv's variable, and what stands there between several values (pip has white space)."""


@dataclass(frozen=True)
class Plan:
    """The packages that are going to be installed."""

    torch: str
    """Its version; the local part names the build: ``2.13.0+cpu``."""
    packages: int
    size: int
    """Bytes of their wheels, as far as the index says."""
    options: tuple[str, ...] = ()
    """What else uv has to be told."""

    @property
    def for_processors(self) -> bool:
        """Whether it leaves CUDA's libraries out."""
        return self.torch.endswith("+cpu")


def run(*command: str, **environment: str) -> str:
    """What a command prints; one that fails ends this program."""
    done = subprocess.run([sys.executable, "-m", *command], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed")
    return done.stdout.decode()


def uv_variables(listing: str) -> dict[str, str]:
    """uv's variables for what ``pip config list`` prints: lines such as ``global.index-url='https://…'``."""
    settings: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.strip().rpartition(".")
        if section in RANK and option in VARIABLES and RANK[section] >= settings.get(option, (0, ""))[0]:
            settings[option] = RANK[section], str(ast.literal_eval(value))
    variables = {}
    for option, (_, value) in settings.items():
        name, separator = VARIABLES[option]
        variables[name] = separator.join(value.split())
    if "UV_INDEX" in variables:  # pip takes the best version of all indexes; uv's default is the first index
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return variables


def choose(uv: Path, extras: str, environment: dict[str, str]) -> tuple[Plan, str]:
    """The smallest set of packages that this machine can reach, and a line that says which it is."""
    found = resolve(uv, extras, environment)
    driver = Path("/proc/driver/nvidia/version").exists()
    if found.for_processors:
        return found, "the build for processors, from a folder or an index of pip's configuration"
    if "UV_DEFAULT_INDEX" in environment:  # packages are to come from there alone
        return found, f"from {urlsplit(environment['UV_DEFAULT_INDEX']).hostname}, which has no build for processors"
    if answers(PYTORCH_INDEX, environment.get("SSL_CERT_FILE")):
        found = resolve(uv, extras, environment, "--torch-backend", "auto" if driver else "cpu")
        return found, "from PyTorch's own index" + (", for this machine's NVIDIA driver" if driver else "")
    if driver:
        return found, "PyPI's build, with CUDA"
    return found, (
        "PyPI's build, with CUDA's libraries though there is no NVIDIA driver: PyTorch's own index, which has a "
        "smaller one, cannot be reached"
    )


def resolve(uv: Path, extras: str, environment: dict[str, str], *options: str) -> Plan:
    """Choose a version of each package. What keeps uv from it ends this program."""
    names = [word for extra in filter(None, extras.split(",")) for word in ("--extra", extra)]
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "pylock.toml"
        command = [str(uv), "pip", "compile", "-q", "pyproject.toml", *names, *options]
        command += ["--python", sys.executable, "--format", "pylock.toml", "--output-file", str(lock)]
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit("uv found no set of packages that fits; its message is above")
        packages = read_lock(lock.read_text())
    torch = next(version for name, version, _ in packages if name == "torch")
    return Plan(torch, len(packages), sum(size for *_, size in packages), options)


def read_lock(text: str) -> list[tuple[str, str, int]]:
    """Name, version, and bytes of the largest wheel of each package of a ``pylock.toml``."""
    packages = []
    for each in tomllib.loads(text)["packages"]:
        files = each.get("wheels") or [each.get("sdist", {})]
        packages.append((each["name"], each.get("version", ""), max(map(wheel_size, files))))
    return packages


def wheel_size(wheel: dict[str, object]) -> int:
    """Bytes of a wheel; 0 where neither the index nor a local file says."""
    path = Path(unquote(urlsplit(str(wheel.get("url", ""))).path))
    if "size" in wheel:
        return int(str(wheel["size"]))
    return path.stat().st_size if path.is_file() else 0


def answers(url: str, certificates: str | None) -> bool:
    """Whether a page comes within a few seconds."""
    try:
        trusted = ssl.create_default_context(cafile=certificates)
        with urllib.request.urlopen(url, timeout=ANSWERS_WITHIN_SECONDS, context=trusted) as page:  # noqa: S310
            return bool(page.status == 200)
    except (OSError, ValueError):
        return False


def missing_space(plan: Plan, uv: Path, environment: dict[str, str]) -> str:
    """What to do about a disk that is too small; empty when it is large enough."""
    free, need = shutil.disk_usage(sys.prefix).free, int(UNPACKED * plan.size)
    if free < need:  # only then: it takes seconds to add the cache up, which the environment shares its files with
        cache = subprocess.run([str(uv), "cache", "dir"], env=environment, stdout=subprocess.PIPE).stdout.decode()
        need -= sum(path.stat().st_size for path in Path(cache.strip()).rglob("*") if path.is_file())
    if free >= need:
        return ""
    smaller = "" if plan.for_processors else (
        ", or name a folder or an index that has PyTorch's builds for processors, without 2.2 GB of CUDA's libraries: "
        "pip config set global.extra-index-url https://download.pytorch.org/whl/cpu"
    )  # fmt: skip
    return (
        f"{need / GB:.1f} GB are needed for {plan.packages} packages, and {free / GB:.1f} GB are free at {sys.prefix}."
        f"\nfix: free some, or put the environment and uv's cache on another disk (make VENV=/disk/venv, "
        f"UV_CACHE_DIR=/disk/uv){smaller}"
    )


def main(*extras: str) -> None:
    """Install with these extras."""
    run("pip", "install", "-q", "--disable-pip-version-check", UV)
    variables = uv_variables(run("pip", "config", "list"))
    environment = {**variables, **os.environ}
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    wanted = ",".join(extras or ("dev",))
    plan, source = choose(uv, wanted, environment)
    print(
        f"torch {plan.torch}: {source}. {plan.packages} packages, {plan.size / GB:.1f} GB to download at most, "
        f"about {UNPACKED * plan.size / GB:.1f} GB on the disk",
        flush=True,
    )
    if problem := missing_space(plan, uv, environment):
        sys.exit(problem)
    quiet = [] if sys.stderr.isatty() else ["-q"]
    command = [str(uv), "pip", "install", *quiet, *plan.options, "--python", sys.executable, "-e", f".[{wanted}]"]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
