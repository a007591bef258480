from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import serving
from core.loading import load_settings
from serving.ray import ray_session, replica_process
from serving.ray.ray_session import end_leftovers
from serving.ray.replica_process import freeze_gc

TITLED = "exec -a VLLM::EngineCore sleep 60"
UNTITLED = f"exec {shlex.quote(sys.executable)} -c 'import time; time.sleep(60)' --multiprocessing-fork"


def engine(log: Path, command: str) -> subprocess.Popen[bytes]:
    """A process with a command line of vLLM's, whose owner only its output tells."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        made = subprocess.Popen(["bash", "-c", command], stdout=out, stderr=out, env={"PATH": "/usr/bin:/bin"})
    while Path(f"/proc/{made.pid}/cmdline").read_bytes().split(b"\0")[0] in (b"bash", b""):  # empty amid exec
        assert made.poll() is None
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("command", [TITLED, UNTITLED])
def test_an_engine_of_this_session_is_ended_and_that_of_another_is_not(tmp_path: Path, command: str) -> None:
    ours = engine(tmp_path / "session" / "logs" / "worker.out", command)
    other = engine(tmp_path / "elsewhere" / "worker.out", command)
    try:
        end_leftovers(tmp_path / "session")
        assert ours.wait(60) == -9
        assert other.poll() is None
    finally:
        other.kill()
        ours.kill()
        other.wait(60)


def test_every_variable_for_serve_is_one_that_this_version_of_serve_reads() -> None:
    told = set(re.findall(r'"(RAY_SERVE_\w+)"', Path(ray_session.__file__).read_text()))
    spec = find_spec("ray.serve._private.constants")
    assert spec is not None and spec.origin is not None
    read = set(re.findall(r'"(RAY_SERVE_\w+)"', Path(spec.origin).read_text()))
    assert len(told) > 15
    assert told <= read


def test_the_servers_environment_lets_large_messages_pass_and_commands_read_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"TMPDIR": str(tmp_path)}
    monkeypatch.setattr(os, "environ", environ)
    settings = load_settings(overrides={"home": tmp_path}, environ={})
    ray_session.prepare_environment(settings)
    pictures = 3 * settings.serve.max_pixels  # gRPC's default, 4 MiB, is a picture of 1.4 megapixels
    assert int(environ["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) > pictures + 2**20
    assert environ[replica_process.SWITCH] == "1"
    load_settings(overrides={"home": tmp_path}, environ=environ)


def test_the_collector_looks_at_what_comes_later_alone() -> None:
    before = len(gc.get_objects())
    freeze_gc()
    try:
        assert len(gc.get_objects()) < before / 100
        later: list[object] = []
        later.append(later)
        assert any(each is later for each in gc.get_objects())
    finally:
        gc.unfreeze()


def test_garbage_that_comes_later_is_collected_by_itself() -> None:
    """The imports of a replica are no measure of the garbage worth collecting: adapters leave a few megabytes each."""
    gc.disable()  # to make these would collect them again and again
    imported: list[list[object]] = [[] for _ in range(400_000)]
    gc.enable()
    freeze_gc()
    collections = gc.get_stats()[2]["collections"]
    later: list[list[object]] = []
    try:
        for _ in range(100_000):
            later.append([later])
        assert gc.get_stats()[2]["collections"] > collections
    finally:
        later.clear()
        imported.clear()
        gc.unfreeze()


def test_every_replica_freezes_once_it_has_started() -> None:
    texts = {path.stem: path.read_text() for path in Path(serving.__file__).parent.rglob("*.py")}
    replicas = {name for name, text in texts.items() if "        begin_replica(" in text}
    assert replicas == {"catalog", "controller", "encoder", "ingress", "vlm"}
    assert [name for name in replicas if "        freeze_gc()\n" not in texts[name]] == []
