"""Starts Ray and Serve on one machine: deployments start while Serve's proxies do, which need each other only later."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from core.settings.serving import Serve
from serving.ray import replica_process
from serving.ray.ray_session import OBJECT_STORE_BYTES
from serving.ray.replica_process import take_over_rays_loggers

if TYPE_CHECKING:
    from ray.serve import Application

LOOK_SECONDS = 0.02


def start_ray(folder: Path, server: Serve) -> None:
    """Start a private Ray session in ``folder``, see :func:`serving.ray.ray_session.session_directory`.

    What its workers write to standard error comes out on that of this process.
    """
    import ray
    import ray.serve

    take_over_rays_loggers()
    ray.init(
        address="local", num_cpus=max(2, os.cpu_count() or 2), include_dashboard=False,
        _temp_dir=str(folder / "ray"), _node_ip_address=replica_process.NODE, log_to_driver=True,
        _metrics_export_port=server.ray_metrics_port or None,
        object_store_memory=OBJECT_STORE_BYTES, configure_logging=False,
    )  # fmt: skip


def deploy(application: Application, name: str, server: Serve) -> None:
    """Start Serve and an application at ``/``. Returns when requests are taken, whatever has answered yet."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    with ThreadPoolExecutor(1, "serve") as threads:
        proxies = threads.submit(
            serve.start,
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=server.host, port=server.port),
            logging_config=quiet,
        )
        _wait_for_controller(proxies)
        target = serve.RunTarget(application, name=name, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_applications_running=False)
        proxies.result()


def _wait_for_controller(proxies: Future[None]) -> None:
    """Return when Serve's controller can be called: ``serve.start`` itself returns when the proxies have started, too,
    and a second one would make a second controller.
    """
    from ray.serve.context import _get_global_client

    while _get_global_client(raise_if_no_controller_running=False) is None:
        if proxies.done():
            proxies.result()  # raises why there is none
        time.sleep(LOOK_SECONDS)
