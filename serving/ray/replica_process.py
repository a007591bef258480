"""Set-up of a replica's process: its port, its logs and its garbage collector."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from core import metrics
from core.logs import configure_logging
from core.settings import Settings

NODE = "127.0.0.2"
"""Address of the private session's node: loopback, but not one that Ray replaces with the machine's own address."""
SWITCH = "SERVE_REPLICAS_ON_LOOPBACK"
"""Without the prefix of Ratchet's settings: a command that inherits it would report an unknown setting."""


def begin_replica(settings: Settings, role: str) -> None:
    """Call it first in a deployment's constructor."""
    close_replica_port()
    configure_replica_logging(settings, role)
    metrics.build.started(role)


def keep_running(
    tasks: dict[str, asyncio.Task[None]], work: Mapping[str, Callable[[], Coroutine[Any, Any, None]]]
) -> None:
    """Start what is not running, or has ended. ``tasks``: those that run, by name."""
    for name, each in work.items():
        if name not in tasks or tasks[name].done():
            tasks[name] = asyncio.get_running_loop().create_task(each())


def close_replica_port() -> None:
    """Keep this replica's gRPC server on loopback, if the session is private to one machine. Call in a deployment's
    constructor. Ray Serve 2.60 opens it on every address, and it unpickles what it gets: anyone who reaches the port
    can run code. The address cannot be set, so the helper that binds it is replaced. With several nodes, close the
    ports with a network policy, or use Ray's TLS (``RAY_USE_TLS=1``), which this leaves alone."""
    if os.environ.get(SWITCH) != "1" or os.environ.get("RAY_USE_TLS") == "1":
        return
    from ray.serve._private import replica

    original = replica.add_port_to_grpc_server
    if getattr(original, "closed", False):
        return

    def closed(server: Any, address: str) -> Any:
        return original(server, address.replace("[::]", NODE))

    closed.closed = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = closed


def configure_replica_logging(settings: Settings, role: str) -> None:
    """Log to standard error as all other processes do. Call it first in a replica's constructor. Ray Serve 2.60 writes
    JSON to its files only, so its loggers pass records on to Ratchet's. An encoder's lines have the request ID of the
    ingress."""
    from ray.serve.context import _get_serve_request_context

    request_id = lambda: str(_get_serve_request_context().request_id)  # noqa: E731
    configure_logging(settings, role, replica=_replica(), request_id=request_id)
    take_over_rays_loggers()


def take_over_rays_loggers() -> None:
    """Send warnings and errors of Ray's and Serve's loggers to this process's log."""
    for name in ("ray", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def _replica() -> str:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return str(serve.get_replica_context().replica_tag)
    except RayServeException:  # not in a deployment
        return ""


def freeze_gc() -> None:
    """Exempt all present objects from garbage collection; call it last in a replica's constructor. Going through some
    600,000 objects of Torch, Ray and their imports stops all threads for 0.3 s or more."""
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: a full one is due when new objects exceed a quarter of those seen by the last one
