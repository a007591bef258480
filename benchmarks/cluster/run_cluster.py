"""``ratchet bench cluster``: the chart's pods as processes, a release, a lost node and an upgrade under load.

From what Helm renders of a profile, and nothing else: the migration, ingest, maintenance, updater, console, and
KubeRay's part of a RayService, each pod in a network and each container with a read-only root of its own (Linux, as
root; Docker and Kubernetes are not needed). A client asks for embeddings and chats through the port ``serve`` of Ray's
head while an operator releases adapters from the console's pod, one of the worker nodes is lost in the middle of a
release, and the chart is upgraded. Every answer is compared with that of the release that it was stamped with.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import yaml

from benchmarks.bench_home import bench_home, clip_base, without_vlm
from benchmarks.cluster.kubernetes import Kubernetes
from benchmarks.cluster.network import HOST
from benchmarks.cluster.stores import POSTGRES_HOST, S3_HOST, start_stores
from benchmarks.figures_table import show_figures
from benchmarks.machine import machine
from benchmarks.samples import wait_until_searchable
from benchmarks.swap import make_adapters, make_vlm_adapters
from ops.errors import ConfigError, RatchetError
from ops.ledger import Ledger
from ops.load.traffic import Report, Traffic
from ops.progress import say, step
from ops.settings import Settings
from ops.testing.chart import merged, of_kind, profile, render_chart
from ops.testing.inputs import pictures
from ops.waiting import wait_until
from serving.client import Client
from streams.producer import Producer

NAMESPACES: Final = "BENCH_CLUSTER_NAMESPACES"
"""Set for the process that has namespaces of its own."""
RELEASE: Final = "live"
NAMESPACE: Final = "ml"
TEXTS: Final = ("a photo of a cat", "a red circle", "an old map", "two birds")
QUESTIONS: Final = ("what is this?", "is there a red car?")
SAMPLES: Final = 24
HELP: Final = "Run it as root on Linux with util-linux and iproute2."
BETWEEN_SECONDS: Final = 10.0
"""Of load between two events."""
STEP_SECONDS: Final = 300.0


def run(settings: Settings, folder: Path, values: Any, rate: float, upgrade: str) -> dict[str, Any]:
    """Run in this process's own namespaces. Returns the figures.

    Args:
        folder: for stores, pods and their logs.
        values: of the chart, over those that an installation has to say.
        rate: requests a second.
        upgrade: one of :data:`UPGRADES`; empty: end when samples went from Kafka to a search.

    Raises:
        RatchetError: a store or a pod does not start.
    """
    with ExitStack() as stack:
        with step("starting the stores"):
            kubernetes = Kubernetes(folder, NAMESPACE, {}, {S3_HOST: HOST, POSTGRES_HOST: HOST})
            stores = start_stores(folder, stack)
            kubernetes.secrets = stores.secrets
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
            say(kubernetes.run(test["metadata"]["name"], test).strip().splitlines()[-1])
        scenario = Scenario(kubernetes, ours, stores.operator_key, rate)
        scenario.publish()
        figures: dict[str, Any] = {"install_seconds": round(installed, 1), "samples": SAMPLES}
        if upgrade:
            figures |= scenario.run(lambda: render_chart(merged(values, UPGRADES[upgrade]), RELEASE, NAMESPACE))
        figures |= {"restarts": kubernetes.all_restarts(), "problems": kubernetes.problems(), "machine": machine()}
        stack.pop_all().close()
        return figures


UPGRADES: Final = {
    "application": {"serving": {"actors": {"encoder": {"cpus": 0.4}, "vlm": {"cpus": 1.2}}}},
    "cluster": {"settings": {"serve": {"deadline_seconds": 31}}},
}
"""Values by what they replace. Serve's configuration alone: the replicas of encoders and VLMs, one after the other. The
settings: the pods of all parts, and KubeRay makes a second cluster, which takes twice the memory for a while."""


class Scenario:
    """What happens under load."""

    def __init__(self, kubernetes: Kubernetes, settings: Settings, operator_key: str, rate: float) -> None:
        self.kubernetes, self.settings, self.operator_key = kubernetes, settings, operator_key
        self.images = pictures(6)
        key = self._operate("keys", "create", "bench", "--scope", "infer").strip()
        questions = [(self.images[0], text) for text in QUESTIONS] if settings.base.vlm else []
        self.load = Traffic(
            self._head(), images=self.images, texts=TEXTS, questions=questions, settings=settings, rate=rate, key=key
        )
        self.killed_at: list[float] = []
        self.releases: list[dict[str, Any]] = []

    def publish(self) -> None:
        """Samples to Kafka; returns when searches find them."""
        with step("from Kafka to search"), Producer(self.settings.kafka) as producer:
            for number, image in enumerate(pictures(SAMPLES)):
                producer.send(image=image, text=f"picture {number}", domain="bench", source="bench")
            producer.flush()
            with Client(self._head(), operator_key=self.operator_key) as client:
                wait_until_searchable(client, SAMPLES)

    def run(self, upgraded: Callable[[], Sequence[Any]]) -> dict[str, Any]:
        """Returns the figures."""
        clips = make_adapters(self.settings, 4)
        vlms = make_vlm_adapters(self.settings, 2) if self.settings.base.vlm else []
        changes = [{"clip": clip, **({"vlm": vlms[n % 2]} if vlms else {})} for n, clip in enumerate(clips)]
        with self.load:
            self._pause()
            took = self._release(changes[0], "release")
            self._pause()
            self._lose_a_node(changes[1])
            self._pause()
            began = time.monotonic()
            how = self.kubernetes.install(upgraded(), lambda: self.load.send_to(self._head()))
            upgrade = time.monotonic() - began
            self._pause()
            self._release(changes[2], "release after the upgrade")
            self._operate("releases", "rollback", "--reason", "bench rollback")
            with step("the end of the first cluster"):
                self.kubernetes.ray.wait_for_retired()
            self._pause()
        with step("comparing every answer"):
            report = self.load.report()
        return {
            **self._counts(report), "upgrade": how, "upgrade_seconds": round(upgrade, 1), "releases": self.releases,
            "release_seconds": round(took, 1), "wrong": report.problems[:5],
        }  # fmt: skip

    def _counts(self, report: Report) -> dict[str, Any]:
        failed = [each for each in report.samples if not each.release]
        hit = [each for each in failed if any(each.began <= at <= each.due + each.seconds for at in self.killed_at)]
        return {
            "requests": report.requests, "failed": len(failed), "failed_on_killed": len(hit),
            "failed_beyond_killed": len(failed) - len(hit), "mixed": report.mixed,
            "chats": sum(each.family == "vlm" for each in report.samples), "releases_seen": len(report.releases),
        }  # fmt: skip

    def _lose_a_node(self, change: dict[str, str]) -> None:
        """Kill a worker while its replicas prepare a release, and wait for its successor."""
        cluster = self.kubernetes.ray.active
        if cluster is None:
            raise RatchetError("no cluster serves.", "Look at the pods' logs.")
        lost = cluster.workers[-1]

        ledger = Ledger.open(self.settings.ledger)

        def kill() -> None:
            wait_until(lambda: ledger.proposals(1)[0].state == "preparing", STEP_SECONDS, pause=0.02)
            self.killed_at.append(time.time())
            lost.kill()
            say(f"{lost.name} is lost; the release is {ledger.proposals(1)[0].state}")

        killer = threading.Thread(target=kill)
        killer.start()
        self._release(change, "release while a node is lost")
        killer.join()
        with step("a successor of the lost node"):
            if not wait_until(cluster.is_ready, STEP_SECONDS):
                raise RatchetError(f"{lost.name} got no successor that is ready.", f"See {self.kubernetes.folder}.")

    def _release(self, change: dict[str, str], reason: str) -> float:
        """From the console's pod, again where it is refused, as an operator would; seconds of the last attempt."""
        words = [word for name, value in change.items() for word in (f"--{name}", value)]
        refusals: list[str] = []
        until = time.monotonic() + STEP_SECONDS
        with step(reason):
            while True:
                began = time.monotonic()
                try:
                    self._operate("releases", "release", *words, "--force", "--reason", reason)
                    break
                except RatchetError as error:
                    refusals.append(str(error)[-200:])
                    say(f"[yellow]refused: {refusals[-1]}[/yellow]")
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)
        took = time.monotonic() - began
        self.releases.append({"reason": reason, "seconds": round(took, 1), "refused": refusals})
        return took

    def _operate(self, *words: str) -> str:
        """``kubectl exec`` in the console's pod."""
        console = self.kubernetes.pod("console").container("console")
        return console.run(["ratchet", *words], STEP_SECONDS, USER="bench")

    def _pause(self) -> None:
        time.sleep(BETWEEN_SECONDS)

    def _head(self) -> str:
        cluster = self.kubernetes.ray.active
        if cluster is None:
            raise RatchetError("no cluster serves.", "Look at the pods' logs.")
        return f"http://{cluster.head.address}:8000"


def main(settings: Settings, arguments: Sequence[str]) -> None:
    """``ratchet bench cluster``. Status 1: a request failed that was not on the lost node, or an answer was mixed."""
    description = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(prog="ratchet bench cluster", description=description)
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
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # the first process of a namespace has none
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
    """Become this command again, where network, mounts and processes are its own: they end with it."""
    if sys.platform != "linux" or os.getuid() != 0:
        raise ConfigError("only root may give pods networks and roots of their own.", HELP)
    os.environ[NAMESPACES] = "1"
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", *sys.orig_argv]
    try:
        os.execvp(words[0], words)  # noqa: S606
    except FileNotFoundError:
        raise ConfigError("unshare is missing.", HELP) from None
