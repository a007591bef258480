"""``ratchet bench cluster``: the chart's pods as processes, a release, a lost node and an upgrade under load.

Everything comes from Helm's output for a profile: the migration, ingest, maintenance, updater, console, and KubeRay's
part of a RayService, each pod in its own network and each container with its own read-only root (Linux, as root; Docker
and Kubernetes are not needed). A client asks for embeddings and chats through the port ``serve`` of Ray's head while an
operator releases adapters from the console's pod, one of the worker nodes is lost during a release, and the chart is
upgraded. Every answer is compared with that of the release in its stamp.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.bench_home import bench_home, clip_base, without_vlm
from benchmarks.cluster.kubernetes import Kubernetes
from benchmarks.cluster.network import HOST, Network
from benchmarks.cluster.scenario import SAMPLES, Scenario
from benchmarks.cluster.stores import POSTGRES_HOST, S3_HOST, start_stores
from benchmarks.command import bench_parser, show_figures
from benchmarks.machine import machine
from core.errors import ConfigError
from core.progress import progress_log, step
from core.settings import Settings
from tests.support.chart import merged, of_kind, profile, render_chart

UPGRADES: Final = {
    "application": {"serving": {"actors": {"encoder": {"cpus": 0.4}, "vlm": {"cpus": 1.2}}}},
    "cluster": {"settings": {"serve": {"deadline_seconds": 31}}},
}
"""Values by what they replace. Serve's configuration only: the replicas of encoders and VLMs, one after the other. The
settings: the pods of all parts, and KubeRay makes a second cluster, which temporarily takes twice the memory."""
NAMESPACES: Final = "BENCH_CLUSTER_NAMESPACES"
"""Set for the process that has its own namespaces."""
RELEASE: Final = "live"
NAMESPACE: Final = "ml"
HELP: Final = "Run it as root on Linux with util-linux and iproute2."


def run(settings: Settings, folder: Path, values: Any, rate: float, upgrade: str) -> dict[str, Any]:
    """Run in this process's own namespaces. Returns the figures.

    Args:
        folder: for stores, pods and their logs.
        values: of the chart, over the required ones.
        rate: requests a second.
        upgrade: one of :data:`UPGRADES`; empty: end once samples from Kafka are found by a search.

    Raises RatchetError if a store or a pod does not start.
    """
    with ExitStack() as stack:
        with step("starting the stores"):
            network = Network(folder / "hosts")
            stores = start_stores(folder, stack)
            names = {S3_HOST: HOST, POSTGRES_HOST: HOST}
            kubernetes = Kubernetes(folder, NAMESPACE, network, stores.secrets, names)
        values = merged(stores.values, values)
        ours = stores.settings(bench_home(settings, folder / "home", clip_base(settings, settings.base.clip)))
        objects = render_chart(values, RELEASE, NAMESPACE)
        if not values["settings"].get("base", {}).get("vlm", "shipped-vlm"):
            ours = without_vlm(ours)
        stack.callback(kubernetes.stop)
        began = time.monotonic()
        kubernetes.install(objects)
        installed = time.monotonic() - began
        with step("helm test"):
            (test,) = of_kind(objects, "Pod")
            progress_log.info(kubernetes.run(test["metadata"]["name"], test).strip().splitlines()[-1])
        scenario = Scenario(kubernetes, ours, stores.operator_key, rate)
        scenario.publish()
        figures: dict[str, Any] = {"install_seconds": round(installed, 1), "samples": SAMPLES}
        if upgrade:
            figures |= scenario.run(lambda: render_chart(merged(values, UPGRADES[upgrade]), RELEASE, NAMESPACE))
        figures |= {"restarts": kubernetes.all_restarts(), "problems": kubernetes.problems(), "machine": machine()}
        stack.pop_all().close()
        return figures


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """Exit with status 1 if a request failed that was not on the lost node, or an answer was mixed."""
    parser = bench_parser("cluster", __doc__)
    parser.add_argument("--profile", default="cpu", help="values file of the chart (cpu)")
    parser.add_argument("--without-vlm", action="store_true", help="serve CLIP alone")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second (4)")
    parser.add_argument("--values", type=Path, default=None, help="more values, a YAML file, as `helm -f`")
    parser.add_argument(
        "--upgrade", choices=sorted(UPGRADES), default="application", help="what it replaces (application)"
    )
    parser.add_argument("--start-only", action="store_true", help="install, `helm test`, Kafka to search, and no load")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the pods' logs (none is kept)")
    options = parser.parse_args(arguments)
    if NAMESPACES not in os.environ:
        _enter_namespaces()
    # The first process of a namespace gets no signal that it has no handler of.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    values = profile(options.profile)
    if options.without_vlm:
        values = merged(values, {"settings": {"base": {"vlm": ""}}})
    if options.values is not None:
        values = merged(values, yaml.safe_load(options.values.read_text()))
    with tempfile.TemporaryDirectory(prefix="ratchet-cluster-", ignore_cleanup_errors=True) as temporary:
        folder = (options.logs or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        figures = run(settings, folder, values, options.rate, "" if options.start_only else options.upgrade)
    show_figures("The chart's pods as processes", figures)
    if figures.get("failed_beyond_killed") or figures.get("mixed") or figures["problems"]:
        raise SystemExit(1)


def _enter_namespaces() -> None:
    """Execute this command again with its own network, mounts and processes, which end with it."""
    if sys.platform != "linux" or os.getuid() != 0:
        raise ConfigError("only root may give pods networks and roots of their own.", HELP)
    os.environ[NAMESPACES] = "1"
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *sys.orig_argv]
    try:
        os.execvp(words[0], words)  # noqa: S606
    except FileNotFoundError:
        raise ConfigError("unshare is missing.", HELP) from None
