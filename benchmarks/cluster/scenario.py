"""Events of an installation under load: releases, a lost node, an upgrade."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks.cluster.kubernetes import Kubernetes
from benchmarks.samples import wait_until_searchable
from benchmarks.swap import make_adapters, make_vlm_adapters
from core.errors import RatchetError
from core.ledger import Ledger
from core.progress import progress_log, step
from core.settings import Settings
from core.waiting import wait_until
from demo.load.traffic import Report, Traffic
from ratchet_client import Client
from streams.kafka.clients import connect_producer
from tests.support.chart import Object
from tests.support.inputs import QUESTIONS, TEXTS, pictures

SAMPLES: Final = 24
BETWEEN_SECONDS: Final = 10.0
"""Of load between two events."""
STEP_SECONDS: Final = 300.0


class Scenario:
    """Its load, and the events one after the other."""

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
        """Send samples to Kafka; returns when searches find them."""
        with step("from Kafka to search"), connect_producer(self.settings.kafka) as producer:
            for number, image in enumerate(pictures(SAMPLES)):
                producer.send(image=image, text=f"picture {number}", domain="bench", source="bench")
            producer.flush()
            with Client(self._head(), self.operator_key) as client:
                wait_until_searchable(client, SAMPLES)

    def run(self, upgraded: Callable[[], Sequence[Object]]) -> dict[str, Any]:
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
        cluster = self.kubernetes.ray.serving
        lost = cluster.workers[-1]
        ledger = Ledger.open(self.settings.ledger)

        def kill() -> None:
            wait_until(lambda: ledger.proposals(1)[0].state == "preparing", STEP_SECONDS, pause=0.02)
            self.killed_at.append(time.time())
            lost.kill()
            progress_log.info(f"{lost.name} is lost; the release is {ledger.proposals(1)[0].state}")

        killer = threading.Thread(target=kill)
        killer.start()
        self._release(change, "release while a node is lost")
        killer.join()
        with step("a successor of the lost node"):
            if not wait_until(cluster.is_ready, STEP_SECONDS):
                raise RatchetError(f"{lost.name} got no successor that is ready.", f"See {self.kubernetes.folder}.")

    def _release(self, change: dict[str, str], reason: str) -> float:
        """Release from the console's pod, retrying refused releases as an operator would. Returns the seconds of the
        last attempt.
        """
        words = [word for name, value in change.items() for word in (f"--{name}", value)]
        refusals: list[str] = []
        until = time.monotonic() + STEP_SECONDS
        with step(reason):
            while True:
                began = time.monotonic()
                try:
                    self._operate("releases", "create", *words, "--force", "--reason", reason)
                    break
                except RatchetError as error:
                    refusals.append(str(error)[-200:])
                    progress_log.warning(f"refused: {refusals[-1]}")
                    if time.monotonic() > until:
                        raise
                    time.sleep(1)
        took = time.monotonic() - began
        self.releases.append({"reason": reason, "seconds": round(took, 1), "refused": refusals})
        return took

    def _operate(self, *words: str) -> str:
        console = self.kubernetes.pod("console").container("console")
        return console.run(["ratchet", *words], STEP_SECONDS, USER="bench")

    def _pause(self) -> None:
        time.sleep(BETWEEN_SECONDS)

    def _head(self) -> str:
        return f"http://{self.kubernetes.ray.serving.head.address}:8000"
