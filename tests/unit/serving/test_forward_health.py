from __future__ import annotations

import asyncio

import pytest

from serving.replicas import forward_health as module
from serving.replicas.forward_health import ForwardHealth


class Device:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.passes = 0

    async def run(self) -> None:
        self.passes += 1
        if self.error is not None:
            raise self.error


async def test_an_idle_replica_runs_a_pass_now_and_then_and_a_busy_one_none(monkeypatch: pytest.MonkeyPatch) -> None:
    health, device = ForwardHealth(), Device()
    await health.check(device.run, busy=False)
    assert device.passes == 0  # it has just started
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.0)
    await health.check(device.run, busy=True)
    assert device.passes == 0
    await health.check(device.run, busy=False)
    assert device.passes == 1


async def test_failures_in_a_row_are_counted_over_requests_and_health_checks() -> None:
    health, device = ForwardHealth(), Device(ValueError("nonsense"))
    health.failed(ValueError("nonsense"))
    await health.check(device.run, busy=True)
    with pytest.raises(RuntimeError, match="3 forward passes in a row failed: ValueError: nonsense"):
        await health.check(device.run, busy=True)


async def test_failures_between_passes_that_work_are_those_of_the_requests() -> None:
    health, device = ForwardHealth(), Device()
    for _ in range(5):
        health.failed(ValueError("this request"))
        await health.check(device.run, busy=True)
    assert device.passes == 5


@pytest.mark.parametrize("message", ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED"])
async def test_a_lost_device_makes_unhealthy_at_once_and_for_good(message: str) -> None:
    health, device = ForwardHealth(), Device()
    health.failed(RuntimeError(message))
    health.succeeded()
    with pytest.raises(RuntimeError, match="does not work any more"):
        await health.check(device.run, busy=False)


async def test_a_lack_of_memory_is_not_a_lost_device() -> None:
    health, device = ForwardHealth(), Device()
    health.failed(RuntimeError("CUDA error: out of memory"))
    await health.check(device.run, busy=False)
    assert device.passes == 1


async def test_a_busy_replica_is_found_out_when_its_passes_never_end_and_not_when_it_is_only_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PROBE_LIMIT_SECONDS", 0.01)
    health, device = ForwardHealth(stall_seconds=0.0), Device()
    for _ in range(module.MAX_FAILURES + 1):
        await health.check(device.run, busy=True)
    assert device.passes == module.MAX_FAILURES + 1
    for _ in range(module.MAX_FAILURES - 1):
        await health.check(asyncio.Event().wait, busy=True)
    with pytest.raises(RuntimeError, match="3 forward passes in a row failed: TimeoutError"):
        await health.check(asyncio.Event().wait, busy=True)
