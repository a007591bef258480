"""Which spaces may be searched before they are complete: what the gate measured of an adapter, and against whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import LedgerUnavailable
from serving.catalog.cross_version import CrossVersionVerdicts
from serving.releases.types import ReleaseSnapshot


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ({"allowed": True, "incumbent": None}, {"bbbb": "aaaa"}),
        ({"allowed": True, "incumbent": "clip-gone"}, {}),
        ({"allowed": False, "incumbent": None}, {}),
        (None, {}),
        (LedgerUnavailable("away", ""), {}),
    ],
    ids=["allowed", "the incumbent is gone", "not allowed", "no verdict", "the ledger is away"],
)
async def test_a_space_is_searched_by_that_of_the_incumbent_where_a_verdict_allows_it(
    measured: Any, found: dict[str, str]
) -> None:
    def verdict_on(clip: str) -> Any:
        if isinstance(measured, Exception):
            raise measured
        return measured and SimpleNamespace(summary={"cross_version": measured})

    ledger: Any = SimpleNamespace(verdict_on=verdict_on)
    verdicts = CrossVersionVerdicts(ledger)
    verdicts.remember([ReleaseSnapshot(1, None, "aaaa", "t")])
    assert await verdicts.read([ReleaseSnapshot(2, "clip-new", "bbbb", "t")], {"aaaa"}) == found
