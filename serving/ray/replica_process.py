"""Set-up of a replica's process: it closes a port, logs as other processes do, and freezes its garbage."""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

from core.logs import configure_logging
from core.settings import Settings

NODE = "127.0.0.2"
"""Address of the private session's node: loopback, but not one that Ray replaces by the machine's own address."""
SWITCH = "SERVE_REPLICAS_ON_LOOPBACK"
"""Not with the prefix of Ratchet's settings: a command that inherits it would be told that it names none."""


def close_replica_port() -> None:
    """Keep this replica's own gRPC server on loopback. Call in a deployment's constructor; does nothing where the
    session is not private to one machine.

    Ray Serve 2.60 opens one in each replica for calls between deployments, on every address, and it unpickles what it
    is sent: anyone who reaches the port can run code. There is no setting for the address, so the one helper that binds
    it is replaced in the replica's process before the server starts. With more than one node, close the ports by a
    network policy or use Ray's TLS (``RAY_USE_TLS=1``), which this leaves alone.
    """
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
    """Log on standard error as every other process. Call it first in a replica's constructor.

    Ray Serve 2.60 encodes as JSON what goes to its files only; what it writes to standard error is text of its own. So
    its loggers pass their records on to ours. What Serve knows of a request it carries from replica to replica: lines
    of an encoder have the id that the ingress gave to the request.
    """
    configure_logging(settings, role, replica=_replica(), request_id=_request_id)
    take_over_rays_loggers()


def take_over_rays_loggers() -> None:
    """Let Ray's and Serve's records of this process, warnings and worse, go where all others go."""
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
    except RayServeException:  # built by hand
        return ""


def _request_id() -> str:
    from ray.serve.context import _get_serve_request_context

    return str(_get_serve_request_context().request_id)


def freeze_gc() -> None:
    """Call it last in a replica's constructor: what is there by now stays, and the garbage collector need not look at
    it again.

    Some 600,000 objects are of torch, Ray and what they import. To go through them takes a third of a second and more,
    in which no thread of the process goes on, and each adapter that is loaded is reason enough to do it.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # of nothing: the next one comes when a quarter of what this one has looked at is new
