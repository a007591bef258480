"""uv installs from where pip would: what pip was told is passed on."""

from __future__ import annotations

import runpy
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "install.py"))


def test_what_pip_was_told_of_an_index_wheels_and_constraints_is_passed_on(script: dict[str, Any]) -> None:
    listing = r"""
:env:.find-links='/opt/wheels'
global.cert='/etc/ssl/ca.crt'
global.constraint='/etc/a.txt /etc/b.txt'
global.find-links='/other'
global.index-url='https://one.example/simple'
install.index-url='https://mirror.example/simple'
install.extra-index-url='\nhttps://two.example/simple\nhttps://three.example/simple'
global.progress-bar='off'
list.format='json'
"""
    assert script["uv_variables"](listing) == {
        "UV_FIND_LINKS": "/opt/wheels",
        "SSL_CERT_FILE": "/etc/ssl/ca.crt",
        "UV_CONSTRAINT": "/etc/a.txt /etc/b.txt",
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_where_pip_was_told_nothing_uv_is_told_nothing(script: dict[str, Any]) -> None:
    assert script["uv_variables"]("") == {}


@pytest.mark.parametrize(("extras", "named"), [(("demo",), ".[demo]"), ((), ".[dev]")])
def test_the_extras_that_are_named_are_installed(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, extras: tuple[str, ...], named: str
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=b"")

    monkeypatch.setattr(subprocess, "run", record)
    with pytest.raises(SystemExit, match="0"):
        script["main"](*extras)
    assert commands[-1][-1] == named


def test_the_tests_need_all_that_the_demo_needs_and_the_demo_needs_no_test_tool() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["demo"] == ["ratchet[local,vlm-cpu]"]
    assert extras["dev"][0].startswith("ratchet[demo,")
    runtime = " ".join(extras["local"] + extras["vlm-cpu"])
    assert not any(tool in runtime for tool in ("pytest", "mypy", "ruff", "playwright"))


def test_the_demo_installs_its_own_extra_unless_that_of_the_tests_is_there(tmp_path: Path) -> None:
    def planned(target: str) -> str:
        command = ["make", "-n", "-C", str(ROOT), target, f"VENV={tmp_path}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "install.py demo" in planned("demo")
    (tmp_path / ".installed-demo").touch()
    assert "install.py" not in planned("demo")
    assert "install.py dev" in planned("test")
    (tmp_path / ".installed-demo").unlink()
    (tmp_path / ".installed-dev").touch()
    assert "install.py" not in planned("demo") + planned("test")
