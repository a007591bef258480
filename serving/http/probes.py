"""What the models can do, as probes ask for it: found out at most once a second, for everybody who asks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core import metrics
from core.dependencies import State, current
from serving.errors import QueueFull, VlmStarting
from serving.http.errors import described
from serving.http.recent import Recent

if TYPE_CHECKING:
    from serving.http.app_state import AppState

log = logging.getLogger("ratchet.http")
Component = Literal["clip", "vlm", "catalog"]
COMPONENTS: tuple[Component, ...] = ("clip", "vlm", "catalog")
PROBE_SECONDS = 10.0
WATCH_SECONDS = 10.0
"""How often the metric that says what answers is brought up to date, though nobody asks."""


@dataclass(frozen=True, slots=True)
class ComponentState:
    """Whether a part answered."""

    ready: bool
    detail: str = "ok"
    """Why not, or that it is busy."""
    release: int = 0
    seconds: float = 0.0
    code: str = "not_ready"
    """Of the error, where it is not ready."""

    @property
    def starting(self) -> bool:
        """Whether this part has not come up for the first time yet: a restart of the process would not help."""
        return not self.ready and self.code == VlmStarting.code


class Probes:
    """State of each part. A full queue is no outage, and a busy VLM is none: the part answers others' requests."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._probe: dict[Component, Callable[[], Awaitable[ComponentState]]] = {
            "clip": self._clip, "vlm": self._vlm, "catalog": self._catalog,
        }  # fmt: skip
        self._of_catalog: dict[str, State] = {}
        self._recent = {name: Recent(probe) for name, probe in self._probe.items()}

    def parts(self) -> tuple[Component, ...]:
        """What is served here."""
        return COMPONENTS if self._state.vlms is not None else ("clip", "catalog")

    async def part(self, name: Component) -> ComponentState:
        """State of one part, at most a second old."""
        return await self._recent[name].get()

    async def all(self) -> dict[Component, ComponentState]:
        """State of every part that is served."""
        names = self.parts()
        return dict(zip(names, await asyncio.gather(*(self.part(name) for name in names)), strict=True))

    def dependencies(self) -> dict[str, State]:
        """What this process and the catalog noted last of each dependency that they have used."""
        return {**self._of_catalog, **{name: found.state for name, found in current().items()}}

    async def watch(self) -> None:
        """Export for ever what answers. What is asked here is not what callers are told: theirs is no older for it."""
        while True:
            for name in self.parts():
                metrics.http.up(name, (await self._probe[name]()).ready)
            await asyncio.sleep(WATCH_SECONDS)

    async def _clip(self) -> ComponentState:
        return await self._passed("clip")

    async def _vlm(self) -> ComponentState:
        return await self._passed("vlm")

    async def _passed(self, name: Literal["clip", "vlm"]) -> ComponentState:
        """One forward pass of a model under the live release."""
        state = self._state
        if state.admission.live is None:
            await state.refresh()
        snapshot = state.admission.live
        if snapshot is None:
            return ComponentState(False, "no release is live yet.")
        deadline = time.monotonic() + PROBE_SECONDS
        if name == "clip":
            rows = state.tokenizer.rows(["alive"])
            return await _observed(state.encoders.encode("text", rows, snapshot, deadline), snapshot.release)
        try:
            work = state.need_vlms().probe(snapshot, deadline)
        except VlmStarting as error:
            return ComponentState(False, error.message, snapshot.release, code=error.code)
        return await _observed(work, snapshot.release)

    async def _catalog(self) -> ComponentState:
        live = self._state.admission.live
        return await _observed(self._ask_catalog(), live.release if live else 0)

    async def _ask_catalog(self) -> None:
        self._of_catalog = (await self._state.index.status()).get("dependencies", {})


async def _observed(work: Awaitable[object], release: int) -> ComponentState:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await work
    except QueueFull:
        return ComponentState(True, "busy", release, time.perf_counter() - began)
    except TimeoutError:
        return ComponentState(False, f"no answer within {PROBE_SECONDS:g} s.", release)
    except Exception as error:
        description = described(error)
        if description.code == "internal":
            log.error("a probe failed", exc_info=error)
        return ComponentState(False, description.message, release, time.perf_counter() - began)
    return ComponentState(True, "ok", release, time.perf_counter() - began)
