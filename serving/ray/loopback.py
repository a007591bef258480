"""Keeps the replicas' own gRPC servers on loopback when Ratchet serves one machine.

Ray Serve 2.60 opens one in each replica for calls between deployments, on every address, and it unpickles what it is
sent: whoever reaches the port can run code. There is no setting for the address, so the one helper that binds it is
replaced in the replica's process before the server starts. With more than one node, close the ports by a network policy
or use Ray's TLS (``RAY_USE_TLS=1``), which this leaves alone.
"""

from __future__ import annotations

import os
from typing import Any

NODE = "127.0.0.2"
"""Address of the private session's node: loopback, but not one that Ray replaces by the machine's own address."""
SWITCH = "SERVE_REPLICAS_ON_LOOPBACK"
"""Not with the prefix of Ratchet's settings: a command that inherits it would be told that it names none."""


def close_replica_port() -> None:
    """Call in a deployment's constructor. Does nothing where the session is not private to one machine."""
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
