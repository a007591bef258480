from __future__ import annotations

import os
import runpy
import subprocess
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
UV = str(Path(sysconfig.get_path("scripts")) / "uv")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "install.py"))


def stub_wheel(folder: Path, version: str) -> None:
    """A wheel of torch without contents."""
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def write_project(folder: Path) -> Path:
    project = folder / "a project"
    (project / "package").mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[project]\nname = "package"\nversion = "1"\ndependencies = ["torch>=2.13,<2.14"]\n'
        "[project.optional-dependencies]\nlocal = []\n"
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\npackages = ["package"]\n'
    )
    return project


def install(folder: Path, pip: dict[str, str]) -> tuple[str, str]:
    """Run install.py for such a project in a new environment. Returns its output and the installed version of torch."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([UV, "venv", "-q", "--seed", python.parents[1]], check=True)
    subprocess.run([UV, "pip", "install", "-q", "--python", python, "uv>=0.13,<1"], check=True)
    env = {**{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}, **pip}
    words = [python, ROOT / "install.py", "local"]
    done = subprocess.run(words, cwd=write_project(folder), env=env, stdout=subprocess.PIPE, text=True, check=True)
    version = "from importlib.metadata import version; print(version('torch'))"
    return done.stdout, subprocess.run([python, "-c", version], capture_output=True, text=True, check=True).stdout


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
    assert script["uv_variables"]("") == {}


def test_the_builds_for_processors_are_taken_from_where_pip_was_told_to_look(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels" / "torch"
    wheels.mkdir(parents=True)
    for version in ("2.13.0", "2.13.0+cpu"):
        stub_wheel(wheels, version)
    said, installed = install(tmp_path, {"PIP_FIND_LINKS": str(wheels)})
    assert "torch 2.13.0+cpu: the build for processors, from a folder or an index of pip's configuration" in said
    assert installed.strip() == "2.13.0+cpu"
