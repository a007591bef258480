"""The running parts, and the steps that the chapters of both models share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import RatchetError
from core.ledger import Ledger, ProposalRow, VerdictRow
from core.ledger.rows import Family
from core.progress import progress_log, step
from core.settings import Settings
from core.waiting import StoodStill, wait_for_progress
from demo.story.screen import Screen
from demo.story.summary import Lesson
from ops.cli.context import Context
from ops.cli.supervisor import Supervisor
from ratchet_client import Client, ServerError
from streams.publish.publisher import publish
from streams.store.sample_store import SampleStore

SOME_ANSWERS_SECONDS = 3.0
"""Time for load under one release before the next: a dozen requests."""


@dataclass
class Stage:
    context: Context
    screen: Screen
    parts: Supervisor
    client: Client
    ledger: Ledger
    store: SampleStore
    published: int = field(default=0)

    @property
    def settings(self) -> Settings:
        return self.context.settings

    def stream(self, domain: str) -> None:
        """Publish a domain's training split through Kafka, and wait until ingest has stored it."""
        report = publish(self.settings, self.settings.home / "data" / domain, split="train", source="demo")
        progress_log.info(report)
        self.published += report.delivered

        def stored() -> int:
            return sum(self.store.offsets().values())

        with step("ingest"):
            self.until(
                lambda: stored() >= self.published, "ingest", lambda: f"{stored()} of {self.published} records stored"
            )

    def until(self, condition: Callable[[], bool], what: str, progress: Callable[[], str], pause: float = 0.25) -> None:
        """Wait for a condition while there is progress. Raises RatchetError when nothing moves any more."""
        trouble = ""

        def holds() -> bool:
            nonlocal trouble
            self.parts.check()
            try:
                return condition()
            except ServerError as error:  # a busy server answers late; the next call may be in time
                trouble = f"; {error.message}"
                return False

        def how_far() -> str:
            try:
                return progress() + trouble
            except ServerError as error:
                return error.message

        try:
            wait_for_progress(
                holds,
                how_far,
                work=self.parts.work,
                tell=lambda text: progress_log.info(f"{what}: {text}"),
                pause=pause,
            )
        except StoodStill as error:
            logs = self.settings.home / "logs"
            raise RatchetError(f"{what} stands still: {error}.", f"The logs in {logs} say why.") from None

    def embedded(self) -> str:
        catalog = self.client.status()["catalog"]
        spaces = (f"{space['rows']} of {catalog['corpus_rows']}" for space in catalog["spaces"].values())
        return f"pictures embedded for search: {', '.join(spaces)}"

    def learn(self, recipe: str) -> VerdictRow:
        """Train an update in a child process and let the gate judge it."""
        self.screen.run(self.context.command("trainer", "--once", "--recipe", recipe, "--retry"))
        verdict = self.ledger.verdicts(1)[0]
        why = f", caught by {', '.join(verdict.summary['caught_by'])}" if verdict.summary["caught_by"] else ""
        progress_log.info(f"the gate says: {verdict.outcome}{why}")
        return verdict

    def await_release(self, family: Family, verdict: VerdictRow) -> dict[str, float]:
        """Wait until the adapter is live everywhere; returns the times measured by the controller."""
        if verdict.outcome != "passed":
            raise RatchetError(f"the default update was {verdict.outcome}.", f"See {self.report(verdict)}.")
        with step("preparing and committing the release"):
            self.until(lambda: self._released(family, verdict), "preparing the release", self._how_far)
            self.until(lambda: self._served() is not None, "every replica's acknowledgement", self._how_far)
        return self._served() or {}

    def back_and_forth(self, family: Family, adapter: str, check: Callable[[int], bool]) -> float:
        """Roll one model back and forward; returns the seconds until every replica served the older release. ``check``:
        called with the number of the rollback's release."""
        other: Family = "vlm" if family == "clip" else "clip"
        kept = self._newest()[other]
        began = time.monotonic()
        back = self.client.rollback(f"the demo wants to see the old {family.upper()}", family=family)
        seconds = time.monotonic() - began
        if not check(back["number"]) or self._newest()[other] != kept:
            raise RatchetError(f"release {back['number']} does not serve what it should.", "The server's log says why.")
        progress_log.info(
            f"release {back['number']} (the old {family.upper()}) was served everywhere after {seconds * 1000:.0f} ms"
        )
        time.sleep(SOME_ANSWERS_SECONDS)
        why = "the demo wants the better model back"
        release = self.client.release
        forward = release(clip=adapter, reason=why) if family == "clip" else release(vlm=adapter, reason=why)
        progress_log.info(f"release {forward['number']} ({adapter}) is live again")
        if self.settings.rollout.hold_after_rollback:
            self.client.resume("the demo has seen the old model")
        time.sleep(SOME_ANSWERS_SECONDS)
        return seconds

    def lesson(self, naive: VerdictRow, default: VerdictRow, swap: dict[str, float], rollback_seconds: float) -> Lesson:
        cost = self.ledger.update(default.update_id).cost
        return Lesson(
            naive=naive, default=default, prepare_seconds=swap["prepare_seconds"],
            commit_seconds=swap["commit_seconds"], rollback_seconds=rollback_seconds,
            budget={"planned": cost["gflops_planned"], "spent": cost["gflops_spent"]},
            report=str(self.report(default)), naive_report=str(self.report(naive)),
        )  # fmt: skip

    def report(self, verdict: VerdictRow) -> Path:
        return Path(self.settings.artifacts) / verdict.report_key / "report.html"

    def _newest(self) -> dict[str, Any]:
        row: dict[str, Any] = self.client.releases(1)["data"][0]
        return row

    def _released(self, family: Family, verdict: VerdictRow) -> bool:
        proposal = self._proposal()
        if proposal is not None and proposal.update_id == verdict.update_id and proposal.state == "failed":
            raise RatchetError(f"the update was not released: {proposal.error}", "The server's log says why.")
        return bool(self._newest()[family] == verdict.adapter)

    def _proposal(self) -> ProposalRow | None:
        return next(iter(self.ledger.proposals(1)), None)

    def _how_far(self) -> str:
        proposal, controller = self._proposal(), self.client.status()["controller"]
        state = f"proposal {proposal.id} is {proposal.state}" if proposal is not None else "nothing is proposed"
        resident = ", ".join(str(each["release"]) for each in controller["resident"])
        trouble = f"; the controller: {controller['trouble']}" if controller.get("trouble") else ""
        return f"{state}; resident releases: {resident}; {self.embedded()}{trouble}"

    def _served(self) -> dict[str, float] | None:
        """Times recorded by the controller once every replica acknowledged the live release."""
        subject = f"release {self.client.live()}"
        rows = (row for row in self.ledger.audit_rows() if row.subject == subject and row.action == "released")
        return next((row.detail for row in rows), None)
