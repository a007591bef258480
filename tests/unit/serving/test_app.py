"""How a server starts, scales and ends: its deployments, its processes, and what it says meanwhile."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.errors import ConfigError
from core.ledger import Family
from core.loading import load_settings
from core.settings import Settings
from core.settings.section import MIB
from core.settings.serving import Serve
from ratchet_client import ServerError
from serving import start_progress
from serving.app import build, drain_seconds
from serving.http import ingress
from serving.http.clip_vectors import ClipVectors
from serving.http.ingress import SHARED, Ingress, share_of, token_texts
from serving.http.store_services import DeletionService, QuarantineService
from serving.ray import ray_session, replica_process
from serving.ray.deployment_status import DeploymentStatus
from serving.ray.ray_session import end_leftovers
from serving.ray.replica_process import freeze_gc
from serving.releases.residency import ResidencyRows
from serving.replicas.follower import ResidencyFollower, ResidencyReader
from serving.start_progress import StartProgress, Statuses
from tests.support.clock import Clock


def test_every_replica_that_ends_has_until_the_last_deadline(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    application: Any = build(settings)
    seen: dict[str, float] = {}

    def walk(application: Any) -> None:
        deployment = application._bound_deployment
        seen[deployment.name] = deployment._deployment_config.graceful_shutdown_timeout_s
        for argument in deployment.init_args:
            if hasattr(argument, "_bound_deployment"):
                walk(argument)

    walk(application)
    assert {"Ingress", "Encoder", "Catalog", "Controller"} <= seen.keys()
    assert set(seen.values()) == {drain_seconds(settings)}
    assert drain_seconds(settings) > settings.serve.deadline_seconds


@pytest.mark.parametrize("known", [True, False], ids=["and then follows", "or nobody can tell in time"])
async def test_it_is_not_healthy_before_it_knows_what_is_live(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "FIRST_SECONDS", 60.0 if known else 0.0)
    asked, answered, count = asyncio.Event(), asyncio.Event(), 0

    async def refresh() -> None:
        nonlocal count
        count += 1
        asked.set()
        await answered.wait()

    forever = lambda: asyncio.Event().wait()  # noqa: E731
    replica: Any = object.__new__(Ingress)
    replica._tasks, replica.vlms = {}, None
    replica.shadow_traffic = SimpleNamespace(run=forever)
    replica.http_app = SimpleNamespace(state=SimpleNamespace(probes=SimpleNamespace(watch=forever)))
    for name, method in (("refresh", refresh), ("_follow", forever), ("_read_keys", forever)):
        monkeypatch.setattr(replica, name, method)
    health = asyncio.create_task(replica.check_health())
    await asked.wait()
    if known:
        assert not health.done()
        answered.set()
    await health
    await replica.check_health()
    assert count == 1 and "follow" in replica._tasks  # from now on it follows


def test_what_all_requests_share_is_divided_and_what_one_may_have_is_not() -> None:
    share = share_of(Serve(ingress_replicas=3))
    for name in SHARED:
        assert 0 <= 3 * getattr(share, name) - getattr(Serve(), name) < 3
    assert (share.max_body_bytes, share.deadline_seconds) == (16 * MIB, 30.0)
    assert share_of(Serve()) == Serve()
    assert (share.body_budget_bytes, share.decode_pixels) == (256 * MIB // 3, 53_333_334)
    crowded = Serve(ingress_replicas=64)
    assert crowded.body_budget_bytes == crowded.max_body_bytes, "the largest body always finds room"


def test_tokens_put_together_are_the_text(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    text_of = token_texts(tmp_path)
    assert "".join(text_of(token) for token in made.encode("a red bus").ids) == "a red bus"
    assert [text_of(token) for token in made.encode("é").ids] == ["\ufffd", "\ufffd"]
    assert text_of(10_000) == "token_id:10000"
    assert token_texts(tmp_path / "none")(7) == token_texts(None)(7) == "token_id:7"
    spaced = Tokenizer(models.WordLevel({"\u2581red": 0, "\u2581bus": 1, "es": 2}, unk_token="es"))
    spaced.decoder = decoders.Metaspace()
    spaced.save(str(tmp_path / "tokenizer.json"))
    assert "".join(token_texts(tmp_path)(token) for token in (0, 1, 2)) == " red buses", "a space before a word stays"


UP = DeploymentStatus({"RUNNING": 1}, failed=False, cause="")
STARTS = DeploymentStatus({"STARTING": 1}, failed=False, cause="")
FAILED = DeploymentStatus({}, failed=True, cause="OSError: no file")


class ScriptedServer:
    """Returns the next entry of each model's script, then repeats the last one."""

    url = "http://there"

    def __init__(self, **script: list[str]) -> None:
        self.script = script

    def why_not_ready(self, model: Family) -> str:
        words = self.script[model]
        return words.pop(0) if len(words) > 1 else words[0]

    def progress(self, *models: Family, statuses: Statuses | None = None) -> StartProgress:
        return StartProgress(cast(Any, self), models, statuses)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_progress, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(start_progress, "STATUS_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("core.waiting.time", SimpleNamespace(monotonic=made, sleep=made.sleep))
    monkeypatch.setattr(start_progress, "LOOK_SECONDS", 1.0)
    return made


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_server_that_says_something_new_is_waited_for_beyond_any_limit(clock: Clock) -> None:
    words = [f"{loaded} of 40 adapters loaded" for loaded in range(40) for _ in range(100)]
    ScriptedServer(clip=[*words, ""]).progress("clip").wait_for("clip", int)
    assert clock.now > 4000


@pytest.mark.parametrize(
    ("computes", "told"),
    [(False, r"CLIP does not start: nothing has moved for 121 s; last: it is starting"),
     (True, r"nothing has come of what is computed for 9\d\d s; last: it is starting")],
)  # fmt: skip
def test_a_server_that_is_idle_is_given_up_and_one_that_computes_later(clock: Clock, computes: bool, told: str) -> None:
    with pytest.raises(ServerError, match=told):
        ScriptedServer(clip=["it is starting"]).progress("clip").wait_for("clip", lambda: clock.now * computes)


def test_a_check_and_a_deployment_that_serve_gave_up_end_the_start_of_clip() -> None:
    ended = Mock(side_effect=ConfigError("serve ended while starting"))
    with pytest.raises(ConfigError, match="ended while starting"):
        ScriptedServer(clip=["nobody listens."]).progress("clip").wait_for("clip", int, ended)
    statuses = Mock(return_value={"Encoder": FAILED, "Vlm": STARTS})
    with pytest.raises(ConfigError, match="Encoder cannot start: OSError: no file"):
        ScriptedServer(clip=["no release"]).progress("clip", statuses=statuses).look()


def test_once_clip_answers_a_failed_deployment_is_said_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    states = {"Encoder": UP, "Catalog": STARTS}

    def statuses() -> Mapping[str, DeploymentStatus]:
        if not states:
            raise ConnectionError("busy")
        return states

    progress = ScriptedServer(clip=[""], vlm=[*["it is starting."] * 3, ""]).progress("clip", "vlm", statuses=statuses)
    assert not progress.look()
    states["Catalog"] = FAILED
    assert not progress.look()
    words = said(capsys)
    assert "Encoder runs after" in words
    assert words.count("Catalog cannot start: OSError: no file") == 1
    states.clear()
    assert not progress.look() and progress.look()


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


def test_the_environment_lets_large_messages_and_commands_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"TMPDIR": str(tmp_path)}
    monkeypatch.setattr(os, "environ", environ)
    settings = load_settings(overrides={"home": tmp_path}, environ={})
    ray_session.prepare_environment(settings)
    pictures = 3 * settings.serve.max_pixels  # gRPC's default, 4 MiB, is a picture of 1.4 megapixels
    assert int(environ["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) > pictures + 2**20
    assert environ[replica_process.SWITCH] == "1"
    load_settings(overrides={"home": tmp_path}, environ=environ)


def test_the_collector_looks_at_what_comes_later_alone_and_collects_it_by_itself() -> None:
    """The imports of a replica are no measure of the garbage worth collecting: adapters leave a few megabytes each."""
    threshold = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's, and a replica's: the tests have another
    gc.disable()  # to make these would collect them again and again
    imported: list[list[object]] = [[] for _ in range(400_000)]
    gc.enable()
    freeze_gc()
    collections = gc.get_stats()[2]["collections"]
    later: list[list[object]] = []
    try:
        assert len(gc.get_objects()) < len(imported) / 100
        for _ in range(100_000):
            later.append([later])
        assert gc.get_stats()[2]["collections"] > collections
    finally:
        later.clear()
        imported.clear()
        gc.unfreeze()
        gc.set_threshold(*threshold)


ROWS = ResidencyRows((), None, ())
UNUSED: Any = Mock()
PURPOSES: dict[str, Callable[[], Awaitable[Any]]] = {
    "deletions": lambda: DeletionService(Settings(), Mock(deletions=Mock(return_value=[]))).newest(5, None),
    "quarantine": lambda: QuarantineService(Settings(), UNUSED).newest(5, None, None),
    "reading": lambda: ResidencyReader(lambda: ROWS, UNUSED, UNUSED).read(),
    "following": lambda: ResidencyFollower("encoder", lambda: ROWS, AsyncMock(return_value=[]), Mock()).step(),
    "heads": lambda: ClipVectors(UNUSED, UNUSED, UNUSED, Serve()).classify(Mock(), UNUSED),
}


@pytest.mark.parametrize("purpose", PURPOSES)
async def test_no_purpose_waits_for_the_threads_of_others(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.ingest.resubmit.list_quarantine", lambda *_: [])
    over, pool = threading.Event(), ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    pool.submit(over.wait, 60)
    try:
        await asyncio.wait_for(PURPOSES[purpose](), 60)
    finally:
        over.set()
