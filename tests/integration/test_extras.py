"""Every extra can be installed from PyPI alone."""

from __future__ import annotations

import pytest

from tests.support import extras
from tests.support.wheels import environment

OLDEST, *OTHERS = extras.VERSIONS


@pytest.mark.parametrize("version", [OLDEST, *(pytest.param(each, marks=pytest.mark.long) for each in OTHERS)])
def test_each_extra_resolves_from_pypi_in_a_clone_and_from_the_wheel(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pip and uv were told elsewhere does not count."""
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("UV_INDEX", "https://other.example/simple")
    assert not environment().keys() & {"PIP_FIND_LINKS", "UV_INDEX"}
    assert extras.unresolved(extras.extras(), version) == {}
    names = [name for name in extras.extras() if name not in extras.IN_A_CLONE]
    assert extras.unresolved(names, version, clone=False) == {}
