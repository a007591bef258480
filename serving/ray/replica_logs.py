"""The log of a replica: that of every other process, on standard error.

Ray Serve 2.60 encodes as JSON what goes to its files only; what it writes to standard error is text of its own. So in a
replica its loggers pass their records on to ours. What Serve knows of a request, it carries from replica to replica:
lines of an encoder have the id that the ingress gave to the request.
"""

from __future__ import annotations

import logging

from core.logs import configure_logging
from core.settings import Settings


def configure_replica_logging(settings: Settings, role: str) -> None:
    """Call it first in a replica's constructor."""
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
