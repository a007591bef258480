"""Which spaces may be searched before they are complete: what the gate measured of an adapter, and against whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from core.errors import LedgerUnavailable
from serving.catalog.cross_version import CrossVersionVerdicts
from serving.releases.types import ReleaseSnapshot

BASE = ReleaseSnapshot(1, None, "aaaa", "t")
NEW = ReleaseSnapshot(2, "clip-new", "bbbb", "t")


class Verdicts:
    """A ledger that has verdicts and nothing else."""

    def __init__(self, **measured: Any) -> None:
        self.measured = measured

    def verdict_on(self, clip: str) -> Any:
        if clip not in self.measured:
            return None
        if self.measured[clip] is None:
            raise LedgerUnavailable("away", "")
        return SimpleNamespace(summary={"cross_version": self.measured[clip]})


def cross_version(measured: dict[str, Any], window: list[ReleaseSnapshot]) -> Any:
    ledger: Any = Verdicts(**measured)
    verdicts = CrossVersionVerdicts(ledger)
    verdicts.remember(window)
    return verdicts.read([NEW], {"aaaa"})


async def test_a_space_is_searched_by_that_of_the_incumbent_it_was_measured_against() -> None:
    allowed = {"allowed": True, "incumbent": None}
    assert await cross_version({"clip-new": allowed}, [BASE]) == {"bbbb": "aaaa"}
    assert await cross_version({"clip-new": {**allowed, "incumbent": "clip-gone"}}, [BASE]) == {}


async def test_without_a_verdict_that_allows_it_searches_wait() -> None:
    assert await cross_version({}, [BASE]) == {}
    assert await cross_version({"clip-new": {"allowed": False, "incumbent": None}}, [BASE]) == {}
    assert await cross_version({"clip-new": None}, [BASE]) == {}, "the ledger is away"
