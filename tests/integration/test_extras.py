"""Every extra can be installed from PyPI alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import extras
from tests.support.own_uv import environment

SMALL = """
[project]
name = "small"
version = "1"
requires-python = ">=3.11"
[project.optional-dependencies]
good = ["ftfy>=6.3,<7"]
bad = ["ftfy>=999"]
new = ["ftfy>=999,<1000"]
[tool.uv]
override-dependencies = ["ftfy>=6"]
"""
OLDEST, *BETWEEN, NEWEST = extras.VERSIONS


@pytest.mark.integration
@pytest.mark.parametrize(
    "version", [OLDEST, *(pytest.param(each, marks=pytest.mark.long) for each in (*BETWEEN, NEWEST))]
)
def test_each_extra_resolves_from_pypi_in_a_clone_and_from_the_wheel(version: str) -> None:
    assert extras.unresolved(extras.extras(), version) == {}
    names = [name for name in extras.extras() if name not in extras.IN_A_CLONE]
    assert extras.unresolved(names, version, clone=False) == {}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(SMALL)
    return tmp_path


@pytest.mark.integration
def test_an_extra_that_wants_a_version_which_does_not_exist_is_named(small: Path) -> None:
    found = extras.unresolved(["good", "bad", "new"], "3.11", small, clone=False)
    assert found.keys() == {"bad", "new"}
    assert "ftfy" in found["bad"]
    assert extras.unresolved(["good", "bad"], "3.11", small) == {}, "the project's own overrides hold"


@pytest.mark.integration
def test_without_pypi_the_check_says_so_and_what_pip_and_uv_were_told_elsewhere_does_not_count(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"UV_CACHE_DIR": str(small / "cache"), "UV_HTTP_RETRIES": "0"}
    others = {"PIP_FIND_LINKS": "/wheels", "UV_INDEX": "https://other.example/simple"}
    proxies = ("HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy")
    for name, value in {**own, **others, **dict.fromkeys(proxies, "http://127.0.0.1:9")}.items():
        monkeypatch.setenv(name, value)
    assert environment().keys() & {*own, *others} == own.keys()
    with pytest.raises(ConnectionError, match="PyPI"):
        extras.resolve(["good"], "3.11", small, clone=False)
