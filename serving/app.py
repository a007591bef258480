"""The Serve application: ingress -> encoders and VLM replicas, next to the catalog and the release controller. One
machine runs it in a private Ray session; under KubeRay a RayService names :func:`build` (``serving.app:build``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.access import Access
from core.child_process import processor_seconds
from core.errors import ConfigError, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.rows import Family
from core.loading import load_settings
from core.logs import configure_logging, log_format
from core.progress import progress_log, step
from core.settings import Settings
from core.settings.serving import Serve
from ratchet_client import Client
from serving.messages import IMAGE_COST, IMAGES_PER_REQUEST, PROMPTS_PER_TEXT, TEXTS_PER_REQUEST
from serving.ray import ray_session
from serving.ray.ray_session import CONNECTIONS, deploy, start_ray
from serving.start_progress import StartProgress

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("ratchet.app")
START_SECONDS = 300.0
CLIP_ATTEMPTS = 3
"""Starts of a replica before Serve, and with it :func:`start`, gives up."""
GRACE_SECONDS = 5.0
"""Time after the last deadline for answers on their way, and for streams that clients read slowly."""
DRAIN_CALL_SECONDS, DRAIN_PAUSE_SECONDS = 5.0, 0.1


@dataclass
class Server:
    url: str
    folder: Path
    lock: int
    drain_seconds: float
    """Longest wait of :meth:`stop` for requests in flight."""
    progress: StartProgress | None = field(default=None, repr=False)
    """Set once the application is deployed; None again when every model has answered."""
    began: float = field(default_factory=time.monotonic, repr=False)
    """On the monotonic clock."""
    _stopped: bool = field(default=False, repr=False)

    def look(self) -> None:
        """Print progress of models that are starting. Call about once a second."""
        if self.progress is not None and self.progress.look():
            self.progress = None

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when every model answers. Raises ServerError with the reason when it takes longer."""
        with Client(self.url) as client:
            client.wait_ready(seconds)

    def stop(self) -> None:
        """Wait for requests in flight, then end the application and its Ray session. Can be called twice."""
        if self._stopped:
            return
        self._stopped = True
        import ray

        if ray.is_initialized():  # otherwise Serve would start a new Ray
            with contextlib.suppress(Exception):  # a broken session must end, too
                asyncio.run(_end_application(self.drain_seconds))
            ray.shutdown()
        ray_session.end_leftovers(self.folder)
        os.close(self.lock)


async def _end_application(seconds: float) -> None:
    """Drain, then shut Serve down in the same event loop: a handle belongs to the loop that called it."""
    from ray import serve

    from serving.releases.broadcast import APP

    with contextlib.suppress(Exception):  # not started yet, or broken
        if serve.status().applications:
            await drain(seconds)
            await asyncio.to_thread(serve.delete, APP)  # shutdown would end HAProxy under the last answers
    await serve.shutdown_async()


async def drain(seconds: float) -> bool:
    """Refuse new requests, and return whether all in flight ended within ``seconds``. Whole requests count, because all
    deployments stop at once afterwards and a request that is still at an ingress needs the models."""
    from ray import serve

    from serving.ray.replica_calls import call_every_replica
    from serving.releases.broadcast import APP, INGRESS

    ingress = serve.get_deployment_handle(INGRESS, APP)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        counts = await call_every_replica(ingress, "drain", seconds=min(left, DRAIN_CALL_SECONDS))
        if not any(counts):
            return True
        await asyncio.sleep(DRAIN_PAUSE_SECONDS)
    return False


def drain_seconds(settings: Settings) -> float:
    """Longest wait of a replica that ends for requests in flight: until the last request's deadline."""
    return settings.serve.deadline_seconds + GRACE_SECONDS


def build(settings: Settings | None = None) -> Application:
    """The Serve graph. Serve routes to the ingress as soon as it runs: a VLM that starts late, or never, does not
    affect CLIP. CPU shares are for placement only and small, so that two cores suffice for all."""
    return application(settings or load_settings())


def application(settings: Settings, encoder_class: Callable[..., Any] | None = None, **options: Any) -> Application:
    """Same as :func:`build` for given settings. ``encoder_class`` replaces :class:`serving.replicas.encoder.Encoder`;
    ``options`` override those of its deployment."""
    from ray import serve
    from ray.serve.config import BackpressureConfig

    from serving.http.ingress import Ingress
    from serving.ray.ray_session import START_ATTEMPTS
    from serving.releases.broadcast import INGRESS, VLM
    from serving.releases.controller import ReleaseController
    from serving.replicas.catalog import CatalogReplica
    from serving.replicas.encoder import Encoder
    from serving.replicas.vlm import VlmReplica

    server = settings.serve
    full = BackpressureConfig(status_code=429, retry_after_s=1)
    common: dict[str, Any] = {
        "max_constructor_retry_count": CLIP_ATTEMPTS, "health_check_period_s": 2.0, "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": drain_seconds(settings), "graceful_shutdown_wait_loop_s": 0.1,
        "max_surge_percent": 1,  # on upgrades one additional replica, so that capacity never drops
    }  # fmt: skip
    encoders: dict[str, Any] = {
        **encoder_scale(server), "ray_actor_options": {"num_cpus": 0.2},
        # Nothing queues in Serve, which does not tell callers apart: FairBatches gives them turns.
        "max_ongoing_requests": encoder_calls(server), "max_queued_requests": server.queue, "backpressure_config": full,
    }  # fmt: skip
    deployed = serve.deployment(encoder_class or Encoder).options(name="Encoder", **encoders | common | options)
    encoder = deployed.bind(settings)
    catalog = serve.deployment(CatalogReplica).options(
        name="Catalog", num_replicas=1, ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=64,
        max_queued_requests=server.queue, **common,
    ).bind(settings, encoder)  # fmt: skip
    vlm = None
    if serves_vlm(settings):
        # The engine makes batches and a queue of its own: every request goes to it at once, none waits in Serve.
        vlm = serve.deployment(VlmReplica).options(
            name=VLM, **vlm_scale(server), ray_actor_options={"num_cpus": 0.2},
            max_ongoing_requests=2 * server.vlm_queue + 64, max_queued_requests=2 * server.vlm_queue + 64,
            backpressure_config=full, **common | {"max_constructor_retry_count": START_ATTEMPTS},
        ).bind(settings)  # fmt: skip
    controller = serve.deployment(ReleaseController).options(
        name="Controller", num_replicas=min(2, server.ingress_replicas), ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=64, max_queued_requests=64, **common,
    ).bind(settings, encoder, catalog, vlm)  # fmt: skip
    # The app's own bounds (429 with OpenAI's error object) come first; Serve's is a backstop. Serve also counts
    # requests whose body is still arriving: up to as many as there are connections.
    app: Application = serve.deployment(Ingress).options(
        name=INGRESS, **ingress_scale(server), ray_actor_options={"num_cpus": 0.2},
        max_ongoing_requests=CONNECTIONS + 2 * server.queue, max_queued_requests=CONNECTIONS,
        backpressure_config=full, **common,
    ).bind(settings, encoder, catalog, controller, vlm)  # fmt: skip
    return app


def ingress_scale(server: Serve) -> dict[str, Any]:
    """Ingress replicas; autoscaling targets a quarter of the requests that one takes before it answers 429."""
    least = server.ingress_replicas
    return _scale(least, server.ingress_max_replicas, max(1, server.queue // least // 4))


def encoder_calls(server: Serve) -> int:
    """Most concurrent calls: requests in pieces of a batch, and 64 for catalog, controller and probes."""
    images = math.ceil(IMAGES_PER_REQUEST / server.max_batch)
    prompts = math.ceil(TEXTS_PER_REQUEST * PROMPTS_PER_TEXT / (server.max_batch * IMAGE_COST))
    return server.queue * max(images, prompts) + 64


def encoder_scale(server: Serve) -> dict[str, Any]:
    """Encoder replicas; autoscaling targets two batches for each: one is computed while another fills."""
    return _scale(server.encoder_replicas, server.encoder_max_replicas, 2 * server.max_batch)


def vlm_scale(server: Serve) -> dict[str, Any]:
    """VLM replicas; autoscaling targets as many requests as one answers concurrently."""
    return _scale(server.vlm_replicas, server.vlm_max_replicas, server.vlm_batch)


def _scale(least: int, most: int, busy: int) -> dict[str, Any]:
    """A fixed number of replicas, or autoscaling by ``busy`` requests in flight for each."""
    if most <= least:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least, "initial_replicas": least, "max_replicas": most, "target_ongoing_requests": busy,
        }
    }  # fmt: skip


def serves_vlm(settings: Settings) -> bool:
    from serving.engines.clip_base import list_bases

    return settings.base.vlm in list_bases(settings.home, "vlm")


def start(settings: Settings) -> Server:
    """Start Ray and the application, and wait until CLIP answers; a VLM follows when it is loaded. Raises ConfigError
    when the home is served already, the port is taken, or CLIP cannot be started."""
    began = time.monotonic()
    logs = settings.logs.model_copy(update={"format": log_format(settings.logs.format)})  # the format of replicas, too
    settings = settings.model_copy(update={"home": settings.home.resolve(), "logs": logs})
    _migrate(settings)
    settings.operator_key()
    folder = ray_session.session_directory(settings)
    held = ray_session.lock(folder)
    server = Server(settings.serve.url, folder, held, drain_seconds(settings), began=began)
    try:
        _start(settings, server)
    except BaseException:
        server.stop()
        raise
    return server


def _migrate(settings: Settings) -> None:
    """Bring the ledger's schema up to date once, before many processes connect. Raises ConfigError when every release
    has another base than the settings; LedgerUnavailable without the ledger and without a copy of the residency."""
    try:
        with contextlib.closing(Ledger.open(settings.ledger)) as ledger:
            _check_base(settings, ledger)
    except LedgerUnavailable as error:
        from serving.releases.residency import ResidencySource

        source = ResidencySource.of(settings, Ledger.lazy(settings.ledger), "server")
        number = source.newest().window[0].number
        progress_log.warning(f"{error.message} starting with release {number}, the last known one ({source.source})")


def _check_base(settings: Settings, ledger: Ledger) -> None:
    from serving.releases.leadership import Lineage

    lineage, live = Lineage.of(settings), ledger.live()
    if lineage is None or live is None or lineage.has(live):
        return
    if not ledger.releases(1, lineage.digest):
        raise ConfigError(
            f"{lineage.why_not(live)}.",
            f"Set base.clip to the base of the live release, or learn on {lineage.name!r} what was learned: "
            f"`ratchet base upgrade {lineage.name}`, then `ratchet base switch {lineage.name}`.",
        )
    progress_log.warning(f"{lineage.why_not(live)}: the newest release of this base answers")


def _start(settings: Settings, server: Server) -> None:
    ray_session.prepare_environment(settings)
    if not ray_session.is_free(settings.serve.host, settings.serve.port):
        raise ConfigError(
            f"port {settings.serve.port} is taken.", "Stop what listens there, or set serve.port to another one."
        )
    if settings.serve.ray_metrics_port and not ray_session.is_free("", settings.serve.ray_metrics_port):
        raise ConfigError(  # Ray's agent would end, and with it the node
            f"port {settings.serve.ray_metrics_port} is taken.",
            "Set serve.ray_metrics_port to another one, or to 0: Ray then exports no metrics.",
        )
    with step("starting Ray"):
        start_ray(server.folder, settings.serve)
    _tell_of_keys(settings)
    with step("loading CLIP and its releases"):
        from serving.ray.deployment_status import read_statuses
        from serving.releases.broadcast import APP

        deploy(build(settings), APP, settings.serve)
        models: tuple[Family, ...] = ("clip", "vlm") if serves_vlm(settings) else ("clip",)
        server.progress = StartProgress(Client(server.url, retries=0), models, lambda: read_statuses(APP), server.began)
        server.progress.wait_for("clip", lambda: processor_seconds(os.getpid()))
    if settings.base.vlm and not serves_vlm(settings):
        progress_log.info(
            f"no VLM is served: no base {settings.base.vlm!r} (`ratchet base build` makes the shipped one)"
        )


def _tell_of_keys(settings: Settings) -> None:
    if settings.serve.on_loopback:
        return
    with contextlib.suppress(LedgerUnavailable), contextlib.closing(Ledger.lazy(settings.ledger)) as ledger:
        if Access(ledger, settings).open:
            progress_log.error(
                f"no key is needed to ask the models on {settings.serve.host} (access.require_keys is never)"
            )
        elif not any({"infer", "search"} & set(key.scopes) for key in ledger.api_keys()):
            progress_log.info(
                "clients need a key, and there is none yet: `ratchet keys create NAME --scope infer --scope search`"
            )


def serve_app(settings: Settings) -> None:
    """``ratchet serve``: start, and stay until SIGINT or SIGTERM. Prints when CLIP and when the VLM answers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # while starting: clean up, then end
    server = start(settings)
    try:
        done = threading.Event()
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, lambda *_: done.set())
        print(f"ratchet serves on {server.url}", flush=True)
        while not done.wait(1.0):
            server.look()
    finally:
        server.stop()


def main(arguments: list[str]) -> None:
    """``python -m serving.app [ratchet.yaml]``: the server alone, for containers and tests."""
    try:
        settings = load_settings(Path(arguments[0]) if arguments else None)
        configure_logging(settings, "serve")
        serve_app(settings)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
