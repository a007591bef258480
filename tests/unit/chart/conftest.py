"""The chart in every profile, with the required values and with all options."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chart import EVERYTHING, PROFILES, merged, of_kind, profile, render

CASES = {
    f"{name}{words}": merged(profile(name), extra)
    for name in ("default", *PROFILES)
    for words, extra in (("", {}), (" with everything", EVERYTHING))
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def values(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def objects(values: Any) -> list[dict[str, Any]]:
    return render(values)


@pytest.fixture
def service(objects: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = of_kind(objects, "RayService")
    return found


@pytest.fixture(scope="module")
def everything() -> list[dict[str, Any]]:
    return render(profile("cpu"), EVERYTHING)
